//! The control socket of a run: where `polder explain` asks.
//!
//! It is served by the run's supervisor, between two looks at the guest, without a thread of its
//! own and without ever waiting: what a peer does or leaves undone costs the run no more than the
//! limits below, and ends none of it.
//!
//! ```text
//! peer:   explain page 17\n          or: explain gpa 2097152\n
//! run:    {"explanation": {..}}\n    or: {"error": {"what", "why", "try"}}\n    and closes
//! ```
//! Who may ask: processes of the same user. The folder is the user's alone, the socket's mode is
//! 0600, and each peer's user is asked of the kernel (SO_PEERCRED).

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use polder::units::{Gpa, PageIndex};
use polder::{Memory, Refusal, VmId};
use serde_json::{Value, json};

use crate::trouble::Trouble;

/// How many peers are listened to at once; others have to come again.
const PEERS: usize = 8;
/// How many are let in at one look.
const AT_ONCE: usize = 16;
/// How many questions are answered at one look.
const ANSWERS: usize = 4;
/// The longest question, in bytes.
pub(crate) const QUESTION: usize = 64;
/// How long a peer may take to ask, and to read.
const PATIENCE: Duration = Duration::from_secs(2);

/// A page to be explained.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Question {
    /// By its index in the object.
    Page(PageIndex),
    /// By where the guest sees it.
    Gpa(Gpa),
}

impl Question {
    /// The question, as a peer sends it.
    pub(crate) fn to_line(self) -> String {
        match self {
            Self::Page(page) => format!("explain page {}\n", page.get()),
            Self::Gpa(gpa) => format!("explain gpa {}\n", gpa.get()),
        }
    }

    /// What a peer sent, without the end of the line: an allegation.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(line).ok()?.split(' ');
        let (verb, kind, number) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
        match (verb, kind, words.next()) {
            ("explain", "page", None) => Some(Self::Page(PageIndex::new(number)?)),
            ("explain", "gpa", None) => Some(Self::Gpa(Gpa::new(number))),
            _ => None,
        }
    }
}

/// A peer that is listened to, or answered.
struct Peer {
    stream: UnixStream,
    since: Duration,
    asked: Vec<u8>,
    answer: Option<Vec<u8>>,
    sent: usize,
}

/// The socket of this run. Dropping it takes it away.
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
    peers: Vec<Peer>,
}

impl Control {
    /// Makes the socket, by the number of this process.
    ///
    /// # Errors
    /// Where there is no folder that is this user's alone, and where no socket can be made there.
    pub(crate) fn listen() -> io::Result<Self> {
        Self::listen_at(folder()?.join(format!("{}.sock", std::process::id())))
    }

    fn listen_at(path: PathBuf) -> io::Result<Self> {
        // Of a process of this number that ended by force.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let control = Self { listener, path, peers: Vec::new() };
        fs::set_permissions(&control.path, Permissions::from_mode(0o600))?;
        control.listener.set_nonblocking(true)?;
        Ok(control)
    }

    /// Listens and answers as far as it can be done now. `now` is the time since the run began.
    pub(crate) fn serve(&mut self, memory: &Memory, vm: VmId, now: Duration) {
        for _ in 0..AT_ONCE {
            let Ok((stream, _)) = self.listener.accept() else { break };
            let ours = is_ours(&stream) && stream.set_nonblocking(true).is_ok();
            if ours && self.peers.len() < PEERS {
                let (asked, answer, sent) = (Vec::new(), None, 0);
                self.peers.push(Peer { stream, since: now, asked, answer, sent });
            }
        }
        let mut answers = 0;
        self.peers.retain_mut(|peer| {
            if now.saturating_sub(peer.since) > PATIENCE || !peer.listen() {
                return false;
            }
            if peer.answer.is_none() && peer.has_asked() && answers < ANSWERS {
                answers += 1;
                peer.since = now;
                peer.answer = Some(answer(&peer.asked, memory, vm));
            }
            peer.tell()
        });
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Where it can't be removed, whoever lists the runs finds that nobody listens.
        let _ = fs::remove_file(&self.path);
    }
}

impl Peer {
    fn has_asked(&self) -> bool {
        self.asked.contains(&b'\n') || self.asked.len() > QUESTION
    }

    /// Takes what has come of a question. Whether the peer is worth listening to.
    fn listen(&mut self) -> bool {
        if self.answer.is_some() || self.has_asked() {
            return true;
        }
        let mut bytes = [0; QUESTION];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.asked.extend_from_slice(&bytes[..count]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Sends what the peer takes of its answer. Whether there is more to do for it.
    fn tell(&mut self) -> bool {
        let Some(answer) = &self.answer else { return true };
        match self.stream.write(&answer[self.sent..]) {
            Ok(count) => {
                self.sent += count;
                count > 0 && self.sent < answer.len()
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}

/// Whether a peer is a process of this user.
fn is_ours(stream: &UnixStream) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(stream);
    peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// The answer to a question, with the end of its line.
fn answer(asked: &[u8], memory: &Memory, vm: VmId) -> Vec<u8> {
    let line = asked.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let refused = |what: &str, why: Option<&str>| json!({ "error": { "what": what, "why": why } });
    let explained = match Question::parse(line) {
        None => Err(refused("no question that this run knows", Some("explain page|gpa NUMBER"))),
        Some(Question::Page(page)) => memory.explain(page).map_err(|error| told(&error, memory)),
        Some(Question::Gpa(gpa)) => {
            memory.explain_gpa(vm, gpa).map_err(|error| told(&error, memory))
        }
    };
    let object = match explained {
        Ok(explanation) => json!({ "explanation": explanation }),
        Err(error) => error,
    };
    format!("{object}\n").into_bytes()
}

fn told(error: &polder::Error, memory: &Memory) -> Value {
    let there = match error {
        polder::Error::Refused(Refusal::Beyond { .. }) => {
            Some(format!("name a page from 0 to {:#x}", memory.pages().get() - 1))
        }
        polder::Error::Refused(Refusal::Unbound { .. }) => {
            let slots = memory.bindings().into_iter().map(|(_, slot, binding)| {
                format!("gpas {} (slot {})", binding.gfns().bytes(), slot.0)
            });
            Some(format!("name an address in {}", slots.collect::<Vec<_>>().join(", ")))
        }
        _ => None,
    };
    json!({ "error": Trouble::new(error, there.as_deref().or(error.way_out())) })
}

/// The folder of this user's sockets, made if it isn't there.
///
/// # Errors
/// Where it can't be made, or isn't this user's alone: then nobody's socket is to be trusted there.
pub(crate) fn folder() -> io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|path| path.is_absolute() && check(path, user).is_ok());
    let folder = match runtime {
        Some(runtime) => runtime.join("polder"),
        None => std::env::temp_dir().join(format!("polder-{user}")),
    };
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    check(&folder, user)?;
    Ok(folder)
}

/// Refuses what is no folder that this user alone can look into.
fn check(folder: &Path, user: u32) -> io::Result<()> {
    // Not what a link leads to, which somebody else may have put there.
    let found = fs::symlink_metadata(folder)?;
    if found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0 {
        return Ok(());
    }
    let what = format!("{} is no folder that is this user's alone", folder.display());
    Err(io::Error::new(ErrorKind::PermissionDenied, what))
}

/// The runs of this user that listen, by their process numbers; sockets that nobody listens to are
/// taken away.
///
/// # Errors
/// As [`folder`], and where it can't be read.
pub(crate) fn runs() -> io::Result<Vec<(u32, PathBuf)>> {
    let mut runs = Vec::new();
    for entry in fs::read_dir(folder()?)? {
        let entry = entry?;
        let path = entry.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        let Some(number) = number.filter(|_| is_socket) else { continue };
        match UnixStream::connect(&path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(&path);
            }
            _ => runs.push((number, path)),
        }
    }
    runs.sort_unstable();
    Ok(runs)
}

#[cfg(test)]
mod tests;
