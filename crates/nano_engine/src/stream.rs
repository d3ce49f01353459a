//! What the reader of one request holds.
//!
//! The output thread merges everything that the reader has not taken yet into one pending delta,
//! so a slow reader neither holds up the engine nor lets memory grow beyond its own output.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nano_core::{RequestId, TokenId};
use parking_lot::{Condvar, Mutex};

use crate::engine_thread::Command;
use crate::error::{Error, Result};

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

/// The place where the output thread leaves deltas.
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
    /// The reader has seen the end, or will with the pending delta.
    is_over: bool,
    error: Option<Error>,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), submitted: Instant::now() }
    }

    /// Adds to the pending delta.
    pub(crate) fn merge(
        &self,
        token_ids: &[TokenId],
        text: &str,
        logits: Option<Vec<f32>>,
        finish: Option<Finish>,
    ) {
        let mut state = self.state.lock();
        if !token_ids.is_empty() {
            let timing = &mut state.pending.timing;
            timing.last_token = self.submitted.elapsed();
            if timing.first_token.is_zero() {
                timing.first_token = timing.last_token;
            }
        }
        state.pending.token_ids.extend_from_slice(token_ids);
        state.pending.text.push_str(text);
        if let Some(mut rows) = logits {
            state.pending.logits.append(&mut rows);
        }
        state.is_over = finish.is_some();
        state.pending.finish = finish;
        state.has_news = true;
        self.changed.notify_one();
    }

    /// Ends the stream with an error, after what is pending.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        state.error = Some(error);
        state.is_over = true;
        self.changed.notify_one();
    }
}

/// The answer to one request. Dropping it before its end aborts the request.
#[derive(Debug)]
pub struct RequestStream {
    id: RequestId,
    prompt: Vec<TokenId>,
    mailbox: Arc<Mailbox>,
    commands: Sender<Command>,
    owner: u32,
}

impl RequestStream {
    pub(crate) fn new(
        id: RequestId,
        prompt: Vec<TokenId>,
        mailbox: Arc<Mailbox>,
        commands: Sender<Command>,
    ) -> Self {
        Self { id, prompt, mailbox, commands, owner: std::process::id() }
    }

    /// The id to abort it by.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The prompt as the model sees it.
    pub fn prompt_token_ids(&self) -> &[TokenId] {
        &self.prompt
    }

    /// Waits for news until `deadline`, without one for ever. `Ok(None)` means that the deadline
    /// passed, or that the end was seen: [`is_over`](Self::is_over) tells them apart.
    ///
    /// # Errors
    /// The typed reason why the stream breaks off, once, after all news before it.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Delta>> {
        let (owner, here) = (self.owner, std::process::id());
        if here != owner {
            return Err(Error::UsedAfterFork { owner, here });
        }
        let mut state = self.mailbox.state.lock();
        loop {
            if state.has_news {
                state.has_news = false;
                let timing = state.pending.timing;
                let next = Delta { timing, ..Delta::default() };
                return Ok(Some(std::mem::replace(&mut state.pending, next)));
            }
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if state.is_over {
                return Ok(None);
            }
            match deadline {
                None => self.mailbox.changed.wait(&mut state),
                Some(deadline) => {
                    if self.mailbox.changed.wait_until(&mut state, deadline).timed_out() {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Whether the end, or the error, has been handed out.
    pub fn is_over(&self) -> bool {
        let state = self.mailbox.state.lock();
        state.is_over && !state.has_news && state.error.is_none()
    }

    /// Waits for the end and returns everything in one delta.
    ///
    /// # Errors
    /// The typed reason why the stream broke off.
    pub fn wait(mut self) -> Result<Delta> {
        let mut all = Delta::default();
        while let Some(delta) = self.next(None)? {
            all.absorb(delta);
        }
        Ok(all)
    }
}

impl Delta {
    /// Appends the delta that follows.
    pub fn absorb(&mut self, next: Delta) {
        self.token_ids.extend(next.token_ids);
        self.text.push_str(&next.text);
        self.logits.extend(next.logits);
        self.finish = next.finish;
        self.timing = next.timing;
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        // In a forked child nobody serves the request, and its lock may be held for ever.
        if std::process::id() == self.owner && !self.mailbox.state.lock().is_over {
            // The engine may be gone, and with it the request.
            let _ = self.commands.send(Command::Abort(self.id));
        }
    }
}
