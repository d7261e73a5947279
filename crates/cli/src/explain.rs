//! `polder explain`.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use polder::Explanation;
use polder::units::{Gpa, PageIndex};
use serde_json::Value;

use crate::control::{self, Question};
use crate::output;
use crate::trouble::Trouble;

/// Explain a page of a running guest: what it is, who sees it, who holds it, and why.
///
/// Asks a `polder run` of the same user that is still running.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder explain 17                   page 17 of the memory
  polder explain gpa:0x200000         the page that the guest sees there
  polder explain 17 --pid 4711        of this run, where there are several
  polder explain 17 --json | jq .explanation.bindings

A run to ask: polder run --guest spin --timeout 60

Exit status: 0 explained, 2 it could not be.")]
pub(crate) struct Arguments {
    /// A page by its number, or by its guest-physical address as gpa:ADDRESS; 0x for hexadecimal
    #[arg(value_name = "PAGE|gpa:ADDRESS", value_parser = question)]
    what: Question,
    /// The process number of the run
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How long the run may take to answer: it looks some twenty times a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is asked, where it has no time for us: others are asking.
const TRIES: u32 = 50;

/// The longest answer, in bytes.
const ANSWER: u64 = 1 << 20;

fn question(text: &str) -> Result<Question, String> {
    let (gpa, digits) = match text.strip_prefix("gpa:") {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let number = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    let number = number.map_err(|_| "expected a page such as 17 or 0x11, or gpa:0x200000")?;
    match gpa {
        true => Ok(Question::Gpa(Gpa::new(number))),
        false => Ok(Question::Page(PageIndex::new(number).ok_or("no memory has such a page")?)),
    }
}

/// Why nothing was explained.
#[derive(Debug, thiserror::Error)]
enum NotAsked {
    #[error("there is no `polder run` to ask")]
    NoRun,
    #[error("process {0} is no `polder run` of this user that could be asked")]
    NoSuchRun(u32, Vec<u32>),
    #[error("there are several runs to ask: {}", list(.0))]
    Several(Vec<u32>),
    #[error("the folder of control sockets can't be used")]
    Folder(#[source] io::Error),
    #[error("run {0} does not answer")]
    Silent(u32, #[source] io::Error),
    #[error("run {0} answers what is no explanation")]
    Garbled(u32, #[source] serde_json::Error),
}

impl NotAsked {
    fn way_out(&self) -> String {
        const START: &str = "start one (polder run --guest spin --timeout 60) and ask meanwhile";
        match self {
            Self::NoRun => START.into(),
            Self::NoSuchRun(_, runs) if runs.is_empty() => format!("there is none; {START}"),
            Self::NoSuchRun(_, runs) => format!("--pid with one of these: {}", list(runs)),
            Self::Several(_) => "say which: --pid PID".into(),
            Self::Folder(_) => "check XDG_RUNTIME_DIR, or what is in its place in /tmp".into(),
            Self::Silent(..) => "it may have ended just now; try again".into(),
            Self::Garbled(..) => "use the same version of polder for both".into(),
        }
    }
}

fn list(pids: &[u32]) -> String {
    pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let answer = match find(arguments.pid).and_then(|(pid, path)| ask(pid, &path, arguments.what)) {
        Ok(answer) => answer,
        Err(error) => return Trouble::new(&error, Some(&error.way_out())).print(arguments.json),
    };
    match answer {
        Answer::Explained(explanation, _) if !arguments.json => {
            output::print(&explanation.to_string(), ExitCode::SUCCESS)
        }
        Answer::Explained(_, object) => output::print(&format!("{object}\n"), ExitCode::SUCCESS),
        Answer::Refused(trouble) => trouble.print(arguments.json),
    }
}

/// What a run said.
enum Answer {
    Explained(Box<Explanation>, Value),
    Refused(Trouble),
}

/// The run to ask, and where.
fn find(pid: Option<u32>) -> Result<(u32, PathBuf), NotAsked> {
    let mut runs = control::runs().map_err(NotAsked::Folder)?;
    if let Some(pid) = pid {
        let all = runs.iter().map(|(run, _)| *run).collect();
        let named = runs.into_iter().find(|(run, _)| *run == pid);
        return named.ok_or(NotAsked::NoSuchRun(pid, all));
    }
    match (runs.pop(), runs.is_empty()) {
        (None, _) => Err(NotAsked::NoRun),
        (Some(only), true) => Ok(only),
        (Some(last), false) => {
            let all = runs.iter().chain([&last]).map(|(run, _)| *run);
            Err(NotAsked::Several(all.collect()))
        }
    }
}

fn ask(pid: u32, path: &Path, question: Question) -> Result<Answer, NotAsked> {
    let mut tries = 0;
    let answer = loop {
        tries += 1;
        match ask_once(path, question) {
            Ok(answer) => break answer,
            // Closed without a word: it listens to so many at once.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof && tries < TRIES => {
                std::thread::sleep(PATIENCE / TRIES);
            }
            Err(error) => return Err(NotAsked::Silent(pid, error)),
        }
    };
    let garbled = |error| NotAsked::Garbled(pid, error);
    let object: Value = serde_json::from_slice(&answer).map_err(garbled)?;
    if let Some(error) = object.get("error") {
        return Ok(Answer::Refused(serde_json::from_value(error.clone()).map_err(garbled)?));
    }
    let explanation = object.get("explanation").cloned().unwrap_or_default();
    let explanation = serde_json::from_value(explanation).map_err(garbled)?;
    Ok(Answer::Explained(explanation, object))
}

fn ask_once(path: &Path, question: Question) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let closed = |error: io::Error| match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ErrorKind::UnexpectedEof.into(),
        _ => error,
    };
    stream.write_all(question.to_line().as_bytes()).map_err(closed)?;
    let mut answer = Vec::new();
    stream.take(ANSWER).read_to_end(&mut answer).map_err(closed)?;
    match answer.ends_with(b"\n") {
        true => Ok(answer),
        false => Err(ErrorKind::UnexpectedEof.into()),
    }
}
