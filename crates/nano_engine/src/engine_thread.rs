//! The thread that owns the engine core.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use nano_core::error::panic_message;
use nano_core::scheduler::SchedulerStats;
use nano_core::{EngineCore, Error, Request, RequestId, Result};
use parking_lot::Mutex;

use crate::output_thread::Output;

/// What the engine thread is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Run a request.
    Submit(Request),
    /// Drop a request, if it has not ended.
    Abort(RequestId),
    /// End the thread, whatever is running.
    Close,
}

/// The engine thread's ends of its channels.
pub(crate) struct Channels {
    pub(crate) commands: Receiver<Command>,
    pub(crate) outputs: Sender<Output>,
    pub(crate) stats: Arc<Mutex<SchedulerStats>>,
}

/// Runs `core` until it is closed or fails. A failure, also a panic, reaches every stream as a
/// typed error: the executor's state is unknown after it, so the engine ends.
pub(crate) fn run(mut core: EngineCore, channels: &Channels) {
    let ended = catch_unwind(AssertUnwindSafe(|| serve(&mut core, channels)));
    let message = match ended {
        Ok(Ok(()) | Err(Error::Stopped)) => return,
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("a step panicked: {}", panic_message(panic.as_ref())),
    };
    // Readers hear of it before the memory is given back.
    let _ = channels.outputs.send(Output::Failed { message: message.clone() });
    tracing::error!("the engine has failed: {message}");
}

fn serve(core: &mut EngineCore, channels: &Channels) -> Result<()> {
    loop {
        if core.is_idle() {
            *channels.stats.lock() = core.stats();
            match channels.commands.recv() {
                Ok(Command::Close) | Err(_) => return Ok(()),
                Ok(command) => obey(core, command, channels),
            }
        }
        for command in channels.commands.try_iter() {
            if matches!(command, Command::Close) {
                return Ok(());
            }
            obey(core, command, channels);
        }
        let events = core.step()?;
        *channels.stats.lock() = core.stats();
        if !events.is_empty() {
            let _ = channels.outputs.send(Output::Events(events));
        }
    }
}

fn obey(core: &mut EngineCore, command: Command, channels: &Channels) {
    match command {
        Command::Submit(request) => core.add(request),
        Command::Abort(request) => {
            if let Some(event) = core.abort(request) {
                let _ = channels.outputs.send(Output::Events(vec![event]));
            }
        }
        Command::Close => {}
    }
}
