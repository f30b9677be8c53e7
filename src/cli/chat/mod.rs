//! `midpo chat`: a conversation in the terminal, with the embedded engine or with a server.

mod embedded;
mod remote;

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use tokio::sync::mpsc;

use super::{CliError, logging};
use crate::config::{ChatOptions, ConfigError, TalkOptions};
use crate::openai::{GateStatistics, GateSummary};
use crate::text::Message;
use crate::types::Variant;
use embedded::Embedded;
use remote::Remote;

const HELP: &str = "\
/variant NAME   routed, base, safety, helpfulness or both
/gates          show the gates of each answer, or stop showing them
/system TEXT    set the system turn and begin anew; without TEXT, none
/reset          begin anew
/exit           end; so does the end of input. Ctrl-C stops an answer.";

/// Lines read ahead of the conversation.
const LINES_AHEAD: usize = 16;

/// What one answer is made from.
struct Turn<'a> {
    messages: &'a [Message],
    variant: Option<Variant>,
    gates: bool,
    temperature: Option<f32>,
    max_tokens: u32,
    seed: Option<u64>,
}

/// An answer that has ended.
struct Answer {
    text: String,
    gates: Option<GateSummary>,
    /// OpenAI's word for why it ended.
    finish_reason: String,
}

/// Why there is no answer; the conversation goes on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct TurnError(String);

impl TurnError {
    fn new(reason: impl ToString) -> Self {
        Self(reason.to_string())
    }
}

/// Who answers.
enum Peer {
    Embedded(Box<Embedded>),
    Remote(Remote),
}

impl Peer {
    async fn answer(
        &self,
        turn: &Turn<'_>,
        on_text: &mut impl FnMut(&str),
    ) -> Result<Answer, TurnError> {
        match self {
            Self::Embedded(peer) => peer.answer(turn, on_text).await,
            Self::Remote(peer) => peer.answer(turn, on_text).await,
        }
    }
}

/// Talks until the input ends. In a script (standard input is no terminal) a turn that failed makes the exit code 1.
pub(super) fn run(options: &ChatOptions) -> Result<ExitCode, CliError> {
    check(&options.chat)?;
    logging::start(&options.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(CliError::io("the runtime"))?;
    let code = runtime.block_on(async {
        let peer = match &options.chat.url {
            Some(url) => Peer::Remote(Remote::connect(url, &options.chat).await?),
            None => Peer::Embedded(Box::new(Embedded::start(options)?)),
        };
        let conversation = Conversation::new(&options.chat, std::io::stdin().is_terminal());
        conversation.hold(&peer, lines()).await
    });
    // The thread that reads lines ends with the process.
    runtime.shutdown_background();
    code
}

fn check(options: &TalkOptions) -> Result<(), ConfigError> {
    let value = |key: &str, expected: &str, found: String| ConfigError::Value {
        origin: format!("--{}", key.replace('_', "-")),
        key: format!("chat.{key}"),
        expected: expected.to_owned(),
        found,
    };
    if let Some(temperature) = options.temperature
        && !(0.0..=2.0).contains(&temperature)
    {
        return Err(value("temperature", "0 to 2", temperature.to_string()));
    }
    if options.max_tokens == 0 {
        return Err(value("max_tokens", "at least 1", "0".to_owned()));
    }
    Ok(())
}

/// Lines of standard input, read by a thread of their own: reading cannot be interrupted.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (send, receive) = mpsc::channel(LINES_AHEAD);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if send.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receive
}

/// What was said so far, and how it goes on.
struct Conversation {
    messages: Vec<Message>,
    system: Option<String>,
    variant: Option<Variant>,
    gates: bool,
    temperature: Option<f32>,
    max_tokens: u32,
    seed: Option<u64>,
    terminal: bool,
    failed: bool,
}

/// What follows a line.
enum Next {
    Line,
    Answer,
    End,
}

impl Conversation {
    fn new(options: &TalkOptions, terminal: bool) -> Self {
        let mut conversation = Self {
            messages: Vec::new(),
            system: options.system.clone(),
            variant: options.variant.map(|name| name.0),
            gates: options.gates,
            temperature: options.temperature,
            max_tokens: options.max_tokens,
            seed: options.seed,
            terminal,
            failed: false,
        };
        conversation.reset();
        conversation
    }

    async fn hold(
        mut self,
        peer: &Peer,
        mut lines: mpsc::Receiver<std::io::Result<String>>,
    ) -> Result<ExitCode, CliError> {
        if self.terminal {
            say("/help lists the commands.\n")?;
        }
        loop {
            if self.terminal {
                say("> ")?;
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(line) = line else { break };
            let line = line.map_err(CliError::io("standard input"))?;
            match self.read(line.trim())? {
                Next::Line => {}
                Next::Answer => self.answer(peer).await?,
                Next::End => break,
            }
        }
        if self.terminal {
            say("\n")?;
        }
        let failed = self.failed && !self.terminal;
        Ok(if failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }

    fn read(&mut self, line: &str) -> Result<Next, CliError> {
        let (command, argument) = line.split_once(' ').unwrap_or((line, ""));
        let argument = argument.trim();
        match command {
            "" => return Ok(Next::Line),
            "/exit" | "/quit" => return Ok(Next::End),
            "/help" => say(&format!("{HELP}\n"))?,
            "/reset" => self.reset(),
            "/gates" => self.gates = !self.gates,
            "/system" => {
                self.system = (!argument.is_empty()).then(|| argument.to_owned());
                self.reset();
            }
            "/variant" => match Variant::parse(argument) {
                Some(variant) => self.variant = Some(variant),
                None => self.complain(&format!(
                    "/variant: expected one of {}, found `{argument}`",
                    Variant::ALL.map(Variant::as_str).join(", ")
                )),
            },
            _ if command.starts_with('/') => {
                self.complain(&format!("{command}: no such command; /help lists them"));
            }
            _ => {
                self.messages.push(message("user", line));
                return Ok(Next::Answer);
            }
        }
        Ok(Next::Line)
    }

    async fn answer(&mut self, peer: &Peer) -> Result<(), CliError> {
        let turn = Turn {
            messages: &self.messages,
            variant: self.variant,
            gates: self.gates,
            temperature: self.temperature,
            max_tokens: self.max_tokens,
            seed: self.seed,
        };
        let mut said = String::new();
        let mut output = Ok(());
        let mut on_text = |text: &str| {
            said.push_str(text);
            if output.is_ok() {
                output = say(text);
            }
        };
        let answer = tokio::select! {
            answer = peer.answer(&turn, &mut on_text) => Some(answer),
            _ = tokio::signal::ctrl_c() => None,
        };
        output?;
        say("\n")?;
        match answer {
            Some(Ok(answer)) => {
                if let Some(gates) = &answer.gates {
                    say(&format!("{}\n", gate_line(gates)))?;
                }
                if answer.finish_reason == "length" {
                    note("(cut off: --max-tokens or the context is used up)");
                }
                self.messages.push(message("assistant", &answer.text));
            }
            // What was said before Ctrl-C stands.
            None => self.messages.push(message("assistant", &said)),
            Some(Err(error)) => {
                self.messages.pop();
                self.complain(&error.to_string());
            }
        }
        Ok(())
    }

    fn complain(&mut self, reason: &str) {
        self.failed = true;
        note(&format!("error: {reason}"));
    }

    fn reset(&mut self) {
        self.messages.clear();
        if let Some(system) = &self.system {
            self.messages.push(message("system", system));
        }
    }
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Message::default()
    }
}

fn say(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(CliError::io("standard output"))
}

fn note(text: &str) {
    // Nothing can be done where standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// `[safety 0.62 at the first word, then 0.03 (0.00 to 0.62); helpfulness ...]`
fn gate_line(gates: &GateSummary) -> String {
    let gate = |name: &str, gate: &GateStatistics| {
        format!(
            "{name} {:.2} at the first word, mean {:.2} ({:.2} to {:.2})",
            gate.prompt_last, gate.mean, gate.min, gate.max
        )
    };
    format!(
        "[{}; {}]",
        gate("safety", &gates.safety),
        gate("helpfulness", &gates.helpfulness)
    )
}
