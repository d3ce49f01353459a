//! The engine as its users hold it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use nano_core::error::panic_message;
use nano_core::scheduler::SchedulerStats;
use nano_core::{EngineCore, Executor, Request, RequestId, RequestKind, SamplingParams, TokenId};
use nano_model::{ModelConfig, ModelInfo, ModelOptions, available_bytes};
use nano_text::{TextDecoder, TextOptions, Tokenizer};
use parking_lot::Mutex;

use crate::engine_thread::{self, Channels, Command};
use crate::error::{Error, Result};
use crate::output_thread::{self, Output, Registered};
use crate::stream::{Mailbox, RequestStream};

/// How long [`Engine::close`] waits for a step that does not end.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// A running engine. Its methods may be called from any thread.
#[derive(Debug)]
pub struct Engine {
    commands: Sender<Command>,
    outputs: Sender<Output>,
    threads: Mutex<Option<Threads>>,
    own_threads: [ThreadId; 2],
    is_closed: AtomicBool,
    /// Taken by valid requests only: the seeds of unseeded ones derive from it.
    next_request: Mutex<u64>,
    tokenizer: Option<Tokenizer>,
    /// Where a missing tokenizer is missing.
    model_dir: PathBuf,
    model: ModelInfo,
    stats: Arc<Mutex<SchedulerStats>>,
    owner: u32,
}

#[derive(Debug)]
struct Threads {
    engine: JoinHandle<()>,
    output: JoinHandle<()>,
    /// Disconnected when the engine thread is about to end.
    engine_done: Receiver<()>,
}

impl Engine {
    /// Loads the model in a directory with `config.json`, weights and, for text, `tokenizer.json`,
    /// and starts serving.
    ///
    /// # Errors
    /// The first thing about the directory or the options that does not hold.
    pub fn load(model_dir: PathBuf, options: ModelOptions) -> Result<Self> {
        // Cheap mistakes show before the weights are read.
        options.limits(false).validate()?;
        let config = ModelConfig::from_dir(&model_dir)?;
        let tokenizer = Tokenizer::from_dir(&model_dir)?;
        Self::spawn(model_dir, tokenizer, move || Ok(nano_model::load(config, &options)?))
    }

    /// Starts an engine on the executor that `build` makes. It is made, used and dropped on the
    /// engine thread. Without a tokenizer, which `model_dir` lacks then, requests are token ids and so
    /// are answers.
    ///
    /// # Errors
    /// That of `build`.
    pub fn spawn(
        model_dir: PathBuf,
        tokenizer: Option<Tokenizer>,
        build: impl FnOnce() -> Result<(Box<dyn Executor>, ModelInfo)> + Send + 'static,
    ) -> Result<Self> {
        let (commands, command_receiver) = unbounded();
        let (outputs, output_receiver) = unbounded();
        let (ready, outcome) = unbounded();
        let (done, engine_done) = unbounded();
        let stats = Arc::new(Mutex::new(SchedulerStats::default()));
        let channels = Channels {
            commands: command_receiver,
            outputs: outputs.clone(),
            stats: Arc::clone(&stats),
        };
        let engine_main = move || {
            let result = build().and_then(|(executor, model)| {
                Ok((EngineCore::new(model.step_limits, executor)?, model))
            });
            match result {
                Ok((core, model)) => {
                    *channels.stats.lock() = core.stats();
                    let _ = ready.send(Ok(model));
                    engine_thread::run(core, &channels);
                }
                Err(error) => drop(ready.send(Err(error))),
            }
            drop(done);
        };
        let engine = thread::Builder::new().name("nano-engine".into()).spawn(engine_main)?;
        let Ok(loaded) = outcome.recv() else {
            let panic = engine.join().err();
            let message =
                panic.as_ref().map_or("no message", |panic| panic_message(panic.as_ref()));
            let message = format!("loading panicked: {message}");
            return Err(Error::EngineFailed { message });
        };
        let model = loaded?;
        let num_texts = tokenizer.as_ref().map_or(0, Tokenizer::vocab_size);
        if num_texts > model.request_limits.vocab_size as usize {
            tracing::warn!(
                "the tokenizer has {num_texts} tokens, but the model's vocab_size is {}: texts with \
                 others will be refused",
                model.request_limits.vocab_size
            );
        }
        let abort = commands.clone();
        let output_main = move || output_thread::run(&output_receiver, &abort);
        let output = thread::Builder::new().name("nano-output".into()).spawn(output_main)?;
        Ok(Self {
            commands,
            outputs,
            own_threads: [engine.thread().id(), output.thread().id()],
            threads: Mutex::new(Some(Threads { engine, output, engine_done })),
            is_closed: AtomicBool::new(false),
            next_request: Mutex::new(0),
            tokenizer,
            model_dir,
            model,
            stats,
            owner: std::process::id(),
        })
    }

    /// Submits a request for tokens and returns at once; without `text` the answer is tokens only.
    ///
    /// # Errors
    /// A prompt or parameter that does not hold, or an engine that has ended.
    pub fn submit(
        &self,
        prompt: Vec<TokenId>,
        params: SamplingParams,
        text: Option<&TextOptions>,
    ) -> Result<RequestStream> {
        let tokenizer = text.and(self.tokenizer.clone());
        let text = text.cloned().unwrap_or_default();
        let text = TextOptions { min_tokens: params.min_tokens, ..text };
        self.submit_kind(prompt, RequestKind::Generate(params), tokenizer, &text)
    }

    /// The logits `[num_tokens, vocab_size]` at every position of `token_ids`, through the same
    /// cache and batches as everything else.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and more logits than there is memory for.
    pub fn logits(&self, token_ids: Vec<TokenId>) -> Result<RequestStream> {
        let text = TextOptions::default();
        self.submit_kind(token_ids, RequestKind::Logits, None, &text)
    }

    fn submit_kind(
        &self,
        prompt: Vec<TokenId>,
        kind: RequestKind,
        tokenizer: Option<Tokenizer>,
        text: &TextOptions,
    ) -> Result<RequestStream> {
        self.check_alive()?;
        let decoder = TextDecoder::new(tokenizer, &prompt, text)?;
        // Held until both threads know the request: an id is one that can be aborted.
        let mut next_request = self.next_request.lock();
        let id = RequestId(*next_request);
        let is_logits = kind == RequestKind::Logits;
        let request = Request::new(id, prompt.clone(), kind, &self.model.request_limits)?;
        if is_logits {
            self.check_logits(prompt.len())?;
        }
        *next_request += 1;
        let mailbox = Arc::new(Mailbox::new());
        let registered = Registered {
            decoder,
            include_stop_token: text.include_stop_str_in_output,
            mailbox: Arc::clone(&mailbox),
        };
        // The output thread hears of the request first, so that it knows it when news come.
        let sent = self.outputs.send(Output::Register(id, registered)).is_ok();
        if !sent || self.is_closed.load(Ordering::Acquire) {
            return Err(Error::EngineClosed);
        }
        // A failed engine takes no command; the output thread has the reason and ends the stream.
        let _ = self.commands.send(Command::Submit(request));
        Ok(RequestStream::new(id, prompt, mailbox, self.outputs.clone()))
    }

    /// Twice: the list of them moves as it grows.
    fn check_logits(&self, num_tokens: usize) -> Result<()> {
        let token_bytes = 2.0 * f64::from(self.model.request_limits.vocab_size) * 4.0;
        let gib = |bytes: f64| bytes / f64::from(1 << 30);
        let needed_gib = gib(num_tokens as f64 * token_bytes);
        let free_gib = gib(available_bytes() as f64);
        if needed_gib > free_gib {
            return Err(Error::LogitsTooLarge { num_tokens, needed_gib, free_gib });
        }
        Ok(())
    }

    /// A prompt's tokens, with the special ones that the tokenizer says.
    ///
    /// # Errors
    /// Without a tokenizer; and a text that is too long however it is encoded, which would take
    /// seconds and gigabytes.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        self.check_alive()?;
        let tokenizer = self.tokenizer()?;
        let (num_bytes, max_model_len) = (text.len(), self.model.request_limits.max_model_len);
        let least = tokenizer.min_num_tokens(num_bytes);
        if least > max_model_len as usize {
            return Err(Error::TextTooLong { num_bytes, least, max_model_len });
        }
        Ok(tokenizer.encode(text, true)?)
    }

    /// Aborts a request; its stream ends with [`Finish::Abort`](crate::Finish::Abort) at once,
    /// whatever step runs. One that has ended is left alone.
    ///
    /// # Errors
    /// An id that no request has had, or an engine that has ended.
    pub fn abort(&self, request: RequestId) -> Result<()> {
        self.check_alive()?;
        if request.0 >= *self.next_request.lock() {
            return Err(Error::UnknownRequest { id: request.to_string() });
        }
        let _ = self.outputs.send(Output::Abort(request));
        Ok(())
    }

    fn check_alive(&self) -> Result<()> {
        let here = std::process::id();
        if here != self.owner {
            return Err(Error::UsedAfterFork { owner: self.owner, here });
        }
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::EngineClosed);
        }
        Ok(())
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has none: what is missing, and where.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || nano_text::Error::no_tokenizer(&self.model_dir).into();
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    /// The model's facts.
    pub fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// The load after the step that ended last.
    ///
    /// # Errors
    /// [`Error::EngineClosed`]; in a forked child [`Error::UsedAfterFork`].
    pub fn stats(&self) -> Result<SchedulerStats> {
        self.check_alive()?;
        Ok(*self.stats.lock())
    }

    /// Ends every stream with [`Error::EngineClosed`] at once, then waits up to two seconds for the
    /// step in flight, which on the CPU ends with its layer or its logits, and gives all memory
    /// back. A step that takes longer is left to itself, and its thread gives the memory back when
    /// it ends. Calling it again does nothing.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        if std::process::id() != self.owner {
            // A forked child has no such threads to wait for, and must not touch their locks.
            return;
        }
        let _ = self.commands.send(Command::Close);
        self.model.stop.store(true, Ordering::Release);
        let _ = self.outputs.send(Output::Close);
        // A handler of the log, or the garbage collector, may come by on a thread of the engine's
        // own, which cannot wait for itself.
        if self.own_threads.contains(&thread::current().id()) {
            return;
        }
        // Held, so that whoever closes it too waits as well.
        let mut threads = self.threads.lock();
        let Some(threads) = threads.take() else { return };
        let _ = threads.output.join();
        match threads.engine_done.recv_timeout(CLOSE_GRACE) {
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(
                    "a step runs {CLOSE_GRACE:?} after the engine was closed: memory comes back \
                     when it ends"
                );
            }
            Ok(()) | Err(RecvTimeoutError::Disconnected) => drop(threads.engine.join()),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
