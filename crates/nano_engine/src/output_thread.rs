//! The thread that turns tokens into text and serves every reader.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use nano_core::error::panic_message;
use nano_core::{FinishReason, RequestId, TokenEvent, TokenId};
use nano_text::TextDecoder;

use crate::engine_thread::Command;
use crate::error::{Error, Result};
use crate::stream::{Delta, Finish, Mailbox, StopReason};

/// What the output thread is told.
pub(crate) enum Output {
    /// A request that is about to be submitted.
    Register(RequestId, Registered),
    /// A reader went away, or somebody asks for a request's end.
    Abort(RequestId),
    /// News from the engine thread.
    Events(Vec<TokenEvent>),
    /// The engine thread has ended by a failure.
    Failed {
        /// Why.
        message: String,
    },
    /// The owner closes the engine.
    Close,
}

/// A request's text and its reader.
pub(crate) struct Registered {
    pub(crate) decoder: TextDecoder,
    /// Whether the text of a token that stops the request by its id belongs to the output.
    pub(crate) include_stop_token: bool,
    pub(crate) mailbox: Arc<Mailbox>,
}

/// Serves until [`Output::Close`]; a failed engine goes on refusing what still comes.
pub(crate) fn run(outputs: &Receiver<Output>, commands: &Sender<Command>) {
    let mut requests: HashMap<RequestId, Registered> = HashMap::new();
    let mut failure: Option<Arc<Error>> = None;
    for output in outputs {
        match output {
            Output::Register(id, request) => match &failure {
                Some(error) => request.mailbox.fail(Arc::clone(error)),
                None => drop(requests.insert(id, request)),
            },
            // Its readers do not wait for the step that runs.
            Output::Abort(request) => {
                let finish = Some(FinishReason::Abort);
                let aborted = TokenEvent { request, token: None, logits: None, finish };
                deliver(&mut requests, aborted);
                let _ = commands.send(Command::Abort(request));
            }
            Output::Events(events) => {
                for event in events {
                    let id = event.request;
                    let engine_is_done = event.finish.is_some();
                    if deliver(&mut requests, event) && !engine_is_done {
                        let _ = commands.send(Command::Abort(id));
                    }
                }
            }
            Output::Failed { message } => {
                let error = failure.insert(Arc::new(Error::EngineFailed { message }));
                fail_all(&mut requests, error);
            }
            Output::Close => break,
        }
    }
    let closed = Arc::new(Error::EngineClosed);
    fail_all(&mut requests, &closed);
    // A request registered behind `Close` must not wait for ever.
    for output in outputs.try_iter() {
        if let Output::Register(_, request) = output {
            request.mailbox.fail(Arc::clone(&closed));
        }
    }
}

fn fail_all(requests: &mut HashMap<RequestId, Registered>, error: &Arc<Error>) {
    #[expect(clippy::iter_over_hash_type, reason = "every stream ends alike, in any order")]
    for (_, request) in requests.drain() {
        request.mailbox.fail(Arc::clone(error));
    }
}

/// Whether the request ends with it.
fn deliver(requests: &mut HashMap<RequestId, Registered>, event: TokenEvent) -> bool {
    let id = event.request;
    // A request that was aborted or whose stop string was found is over, and the engine may not
    // know it yet.
    let Some(request) = requests.get_mut(&id) else { return false };
    // A panic while one request's text is made ends that request, not the thread that serves all.
    let mut news = Delta { logits: event.logits.unwrap_or_default(), ..Delta::default() };
    let decoded =
        catch_unwind(AssertUnwindSafe(|| decode(request, event.token, event.finish, &mut news)));
    let decoded = decoded.unwrap_or_else(|panic| {
        let message = format!("a panic: {}", panic_message(panic.as_ref()));
        Err(Error::TextFailed { id, message })
    });
    let is_over = news.finish.is_some() || decoded.is_err();
    if decoded.is_ok() || !news.token_ids.is_empty() || !news.text.is_empty() {
        request.mailbox.merge(news);
    }
    if let Err(error) = decoded {
        let error = Arc::new(error);
        request.mailbox.fail(Arc::clone(&error));
        // Readers first: a handler of the log may take its time.
        if matches!(*error, Error::TextFailed { .. }) {
            tracing::error!("{error}");
        }
    }
    if is_over {
        requests.remove(&id);
    }
    is_over
}

/// Adds to `news` what has become of the token, also where an error ends it.
fn decode(
    request: &mut Registered,
    token: Option<TokenId>,
    finish: Option<FinishReason>,
    news: &mut Delta,
) -> Result<()> {
    news.token_ids.extend(token);
    let stops_by_id = matches!(finish, Some(FinishReason::Stop(_)));
    if let Some(token) = token.filter(|_| !stops_by_id || request.include_stop_token) {
        let step = request.decoder.push(token)?;
        news.text.push_str(&step.text);
        if let Some(stop) = step.stopped {
            news.finish = Some(Finish::Stop(Some(StopReason::Text(stop))));
            return Ok(());
        }
    }
    let Some(reason) = finish else { return Ok(()) };
    let rest = request.decoder.finish()?;
    news.text.push_str(&rest.text);
    news.finish = Some(match (rest.stopped, reason) {
        (Some(stop), _) => Finish::Stop(Some(StopReason::Text(stop))),
        (None, FinishReason::Stop(token)) => Finish::Stop(token.map(StopReason::Token)),
        (None, FinishReason::Length) => Finish::Length,
        (None, FinishReason::Abort) => Finish::Abort,
        (None, FinishReason::Error(error)) => return Err(error.into()),
    });
    Ok(())
}
