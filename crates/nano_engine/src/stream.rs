//! What the reader of one request holds.
//!
//! The output thread merges everything that the reader has not taken yet into one pending delta,
//! so a slow reader neither holds up the engine nor lets memory grow beyond its own output.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nano_core::{RequestId, TokenId};
use parking_lot::{Condvar, Mutex};

use crate::error::Error;
use crate::output_thread::Output;

/// What a stop was due to, beside the model's end-of-sequence tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(TokenId),
    /// One of the stop strings.
    Text(String),
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop(Option<StopReason>),
    /// `max_tokens` or `max_model_len` was reached, or all logits were delivered.
    Length,
    /// It was aborted.
    Abort,
}

impl Finish {
    /// vLLM's word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stop(_) => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// When a request's tokens came, in time since its submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Timing {
    /// Until the first token; zero before it.
    pub first_token: Duration,
    /// Until the newest token; zero before the first.
    pub last_token: Duration,
}

/// Everything that is new since the last delta.
#[derive(Debug, Default)]
pub struct Delta {
    /// New tokens.
    pub token_ids: Vec<TokenId>,
    /// New text; it may lag behind the tokens while it could still begin a stop string.
    pub text: String,
    /// New rows of logits, `[_, vocab_size]`, for a request of logits.
    pub logits: Vec<f32>,
    /// Set on the last delta.
    pub finish: Option<Finish>,
    /// Of the whole request so far.
    pub timing: Timing,
}

/// The place where the output thread leaves what the readers have not taken.
#[derive(Debug)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
    submitted: Instant,
}

#[derive(Debug, Default)]
struct State {
    pending: Delta,
    has_news: bool,
    /// It stays: every reader is told.
    end: Option<Result<Finish, Arc<Error>>>,
}

impl State {
    fn take(&mut self) -> Delta {
        self.has_news = false;
        let next = Delta { timing: self.pending.timing, ..Delta::default() };
        let finish = self.end.as_ref().and_then(|end| end.as_ref().ok()).cloned();
        Delta { finish, ..std::mem::replace(&mut self.pending, next) }
    }
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), submitted: Instant::now() }
    }

    /// Adds to what is pending.
    pub(crate) fn merge(&self, mut news: Delta) {
        let mut state = self.state.lock();
        let State { pending, has_news, end } = &mut *state;
        if !news.token_ids.is_empty() {
            pending.timing.last_token = self.submitted.elapsed();
            if pending.timing.first_token.is_zero() {
                pending.timing.first_token = pending.timing.last_token;
            }
        }
        pending.token_ids.append(&mut news.token_ids);
        pending.text.push_str(&news.text);
        pending.logits.append(&mut news.logits);
        *end = news.finish.map(Ok);
        // Whoever waits beside pending news waits for the end.
        if !std::mem::replace(has_news, true) || end.is_some() {
            self.changed.notify_all();
        }
    }

    /// Ends the stream with an error, after what is pending.
    pub(crate) fn fail(&self, error: Arc<Error>) {
        self.state.lock().end = Some(Err(error));
        self.changed.notify_all();
    }
}

/// The answer to one request. Dropping it before its end aborts the request.
#[derive(Debug)]
pub struct RequestStream {
    id: RequestId,
    prompt: Vec<TokenId>,
    mailbox: Arc<Mailbox>,
    outputs: Sender<Output>,
    owner: u32,
}

impl RequestStream {
    pub(crate) fn new(
        id: RequestId,
        prompt: Vec<TokenId>,
        mailbox: Arc<Mailbox>,
        outputs: Sender<Output>,
    ) -> Self {
        Self { id, prompt, mailbox, outputs, owner: std::process::id() }
    }

    /// The id to abort it by.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The prompt as the model sees it.
    pub fn prompt_token_ids(&self) -> &[TokenId] {
        &self.prompt
    }

    /// Waits until `deadline` for what [`next`](Self::next) would return, and leaves it there.
    ///
    /// # Errors
    /// In a forked child.
    pub fn await_news(&self, deadline: Instant) -> Result<Poll<()>, Arc<Error>> {
        self.wait(deadline, |state| (state.has_news || state.end.is_some()).then_some(Ok(())))
    }

    /// The same of [`collect`](Self::collect).
    ///
    /// # Errors
    /// In a forked child.
    pub fn await_end(&self, deadline: Instant) -> Result<Poll<()>, Arc<Error>> {
        self.wait(deadline, |state| state.end.is_some().then_some(Ok(())))
    }

    /// Waits for news until `deadline`; `None` follows the last of them.
    ///
    /// # Errors
    /// The typed reason why the stream breaks off, after all news before it.
    pub fn next(&self, deadline: Instant) -> Result<Poll<Option<Delta>>, Arc<Error>> {
        self.wait(deadline, |state| match &state.end {
            _ if state.has_news => Some(Ok(Some(state.take()))),
            Some(end) => Some(end.clone().map(|_| None)),
            None => None,
        })
    }

    /// Waits for the end until `deadline` and takes all news in one delta. Before the end it takes
    /// nothing.
    ///
    /// # Errors
    /// The typed reason why the stream broke off.
    pub fn collect(&self, deadline: Instant) -> Result<Poll<Delta>, Arc<Error>> {
        self.wait(deadline, |state| Some(state.end.clone()?.map(|_| state.take())))
    }

    /// Ends the request, if it has not ended; readers are told at once.
    pub fn abort(&self) {
        // In a forked child nobody serves the request, and its lock may be held for ever.
        if std::process::id() == self.owner && self.mailbox.state.lock().end.is_none() {
            // The engine may be gone, and with it the request.
            let _ = self.outputs.send(Output::Abort(self.id));
        }
    }

    fn wait<T>(
        &self,
        deadline: Instant,
        read: impl Fn(&mut State) -> Option<Result<T, Arc<Error>>>,
    ) -> Result<Poll<T>, Arc<Error>> {
        let (owner, here) = (self.owner, std::process::id());
        if here != owner {
            return Err(Arc::new(Error::UsedAfterFork { owner, here }));
        }
        let mut state = self.mailbox.state.lock();
        loop {
            if let Some(outcome) = read(&mut state) {
                return outcome.map(Poll::Ready);
            }
            if self.mailbox.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok(Poll::Pending);
            }
        }
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.abort();
    }
}
