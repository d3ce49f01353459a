//! Records on their way to Python's `logging`, which a thread of their own hands over: a handler may
//! take its time, or ask the engine, and holds neither a step nor a reader.

use std::io;
use std::iter;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;
use pyo3_log::{Caching, Logger};

use crate::signals::SIGNAL_INTERVAL;

/// How long a flush waits for a handler that is at one record.
const GRACE: Duration = Duration::from_secs(2);

/// This crate's logger.
static LOGGER: OnceLock<PythonLogger> = OnceLock::new();

struct PythonLogger {
    python: Logger,
    /// From the first engine on: a program that has none may fork without a thought of threads.
    thread: OnceLock<Box<LogThread>>,
    num_handled: AtomicU64,
    /// The interpreter ends: a thread that comes to it then would be killed in the middle.
    is_over: AtomicBool,
}

struct LogThread {
    id: ThreadId,
    messages: Sender<Message>,
    /// The process that has the thread: a fork has it not.
    owner: u32,
    /// The thread of such a fork, once that makes an engine itself.
    of_fork: OnceLock<Box<LogThread>>,
}

enum Message {
    Record {
        level: Level,
        target: String,
        text: String,
        file: Option<String>,
        line: Option<u32>,
    },
    /// Dropped when it has been come to.
    Flush(#[expect(dead_code, reason = "its drop tells")] Sender<()>),
}

/// Makes it the process's logger; a second import keeps the first.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let python = Logger::new(py, Caching::LoggersAndLevels)?;
    let logger = LOGGER.get_or_init(|| PythonLogger {
        python,
        thread: OnceLock::new(),
        num_handled: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
    Ok(())
}

/// For an engine to come: starts the thread, and asks Python anew which levels its loggers have.
pub(crate) fn start() -> io::Result<()> {
    let Some(logger) = LOGGER.get() else { return Ok(()) };
    logger.python.reset_handle().reset();
    if logger.thread().is_none() {
        let (messages, receiver) = unbounded();
        let main = || logger.hand_over(receiver);
        let thread = thread::Builder::new().name("nano-log".into()).spawn(main)?;
        let (id, owner, of_fork) = (thread.thread().id(), process::id(), OnceLock::new());
        let last = logger.threads().last().map_or(&logger.thread, |it| &it.of_fork);
        let _ = last.set(Box::new(LogThread { id, messages, owner, of_fork }));
    }
    Ok(())
}

/// Waits until what was logged before has been handled, or a handler stays at one record for
/// [`GRACE`]; never for itself. Ctrl-C ends the wait.
pub(crate) fn flush(py: Python<'_>) -> PyResult<()> {
    let Some(logger) = LOGGER.get() else { return Ok(()) };
    let Some(thread) = logger.thread().filter(|it| it.id != thread::current().id()) else {
        return Ok(());
    };
    let (done, is_done) = bounded::<()>(0);
    let _ = thread.messages.send(Message::Flush(done));
    let num_handled = || logger.num_handled.load(Ordering::Relaxed);
    let (mut last, mut since) = (num_handled(), Instant::now());
    while since.elapsed() < GRACE
        && py.detach(|| is_done.recv_timeout(SIGNAL_INTERVAL)) == Err(RecvTimeoutError::Timeout)
    {
        py.check_signals()?;
        if num_handled() != last {
            (last, since) = (num_handled(), Instant::now());
        }
    }
    Ok(())
}

/// At the end of the program: nothing is handed over after it.
#[pyfunction]
pub(crate) fn end(py: Python<'_>) -> PyResult<()> {
    let flushed = flush(py);
    if let Some(logger) = LOGGER.get() {
        logger.is_over.store(true, Ordering::Release);
    }
    flushed
}

impl PythonLogger {
    fn hand_over(&self, messages: Receiver<Message>) {
        for message in messages {
            if self.is_over.load(Ordering::Acquire) {
                return;
            }
            let Message::Record { level, target, text, file, line } = message else { continue };
            self.python.log(
                &Record::builder()
                    .level(level)
                    .target(&target)
                    .args(format_args!("{text}"))
                    .file(file.as_deref())
                    .line(line)
                    .build(),
            );
            self.num_handled.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn threads(&self) -> impl Iterator<Item = &LogThread> {
        let first = self.thread.get().map(Box::as_ref);
        iter::successors(first, |it| it.of_fork.get().map(Box::as_ref))
    }

    fn thread(&self) -> Option<&LogThread> {
        self.threads().find(|it| it.owner == process::id())
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

    fn flush(&self) {}
}
