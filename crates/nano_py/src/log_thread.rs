//! Records on their way to Python's `logging`, which a thread of their own hands over: a handler may
//! take its time, or ask the engine, and holds neither a step nor a reader.

use std::io;
use std::process;
use std::sync::OnceLock;
use std::thread::{self, ThreadId};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;
use pyo3_log::{Caching, Logger};

/// How long a flush waits for a handler.
const GRACE: Duration = Duration::from_secs(2);

/// This crate's logger.
static LOGGER: OnceLock<PythonLogger> = OnceLock::new();

struct PythonLogger {
    python: Logger,
    /// From the first engine on: a program that has none may fork without a thought of threads.
    thread: OnceLock<LogThread>,
}

struct LogThread {
    id: ThreadId,
    messages: Sender<Message>,
    /// The process that has the thread: a fork has it not.
    owner: u32,
}

enum Message {
    Record { level: Level, target: String, text: String, file: Option<String>, line: Option<u32> },
    Flush(Sender<()>),
}

/// Makes it the process's logger; a second import keeps the first.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let python = Logger::new(py, Caching::LoggersAndLevels)?;
    let logger = LOGGER.get_or_init(|| PythonLogger { python, thread: OnceLock::new() });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
    Ok(())
}

/// For an engine to come: starts the thread, and asks Python anew which levels its loggers have.
pub(crate) fn start() -> io::Result<()> {
    let Some(logger) = LOGGER.get() else { return Ok(()) };
    logger.python.reset_handle().reset();
    if logger.thread.get().is_none() {
        let (messages, receiver) = unbounded();
        let main = || hand_over(&logger.python, receiver);
        let thread = thread::Builder::new().name("nano-log".into()).spawn(main)?;
        let id = thread.thread().id();
        let _ = logger.thread.set(LogThread { id, messages, owner: process::id() });
    }
    Ok(())
}

/// Waits until what was logged before has been handled, though not for long, and never for itself.
pub(crate) fn flush(py: Python<'_>) {
    py.detach(|| log::logger().flush());
}

fn hand_over(python: &Logger, messages: Receiver<Message>) {
    for message in messages {
        match message {
            Message::Record { level, target, text, file, line } => python.log(
                &Record::builder()
                    .level(level)
                    .target(&target)
                    .args(format_args!("{text}"))
                    .file(file.as_deref())
                    .line(line)
                    .build(),
            ),
            Message::Flush(done) => drop(done),
        }
    }
}

impl PythonLogger {
    fn thread(&self) -> Option<&LogThread> {
        self.thread.get().filter(|it| it.owner == process::id())
    }
}

impl Log for PythonLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.python.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let Some(thread) = self.thread() else { return self.python.log(record) };
        if self.enabled(record.metadata()) {
            let _ = thread.messages.send(Message::Record {
                level: record.level(),
                target: record.target().to_owned(),
                text: record.args().to_string(),
                file: record.file().map(ToOwned::to_owned),
                line: record.line(),
            });
        }
    }

    fn flush(&self) {
        if let Some(thread) = self.thread().filter(|it| it.id != thread::current().id()) {
            let (done, is_done) = bounded(0);
            let _ = thread.messages.send(Message::Flush(done));
            let _ = is_done.recv_timeout(GRACE);
        }
    }
}
