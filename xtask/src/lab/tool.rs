//! Other people's programs: whether they are there, how they are run, and what they said; and the
//! files that they work on.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How much of what a program said is shown where it failed.
const LINES: usize = 8;

/// What an interrupted command failed with.
pub(super) const INTERRUPTED: &str = "interrupted";

/// Becomes true when somebody wants us to end, from the first call on; the second time that they
/// do, we do at once.
pub(super) fn interrupted() -> Result<&'static AtomicBool, String> {
    static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(interrupted) = INTERRUPTED.get() {
        return Ok(interrupted);
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|why| format!("signals: {why}"))?;
    }
    Ok(INTERRUPTED.get_or_init(|| interrupted))
}

/// Refuses where programs are missing, and says how to get them.
pub(super) fn missing(needs: &[(&str, &str)], who: &str) -> Result<(), String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    let missing: Vec<_> = needs.iter().filter(|(name, _)| !found(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    Err(format!(
        "{who} needs {}, missing here: apt-get install --no-install-recommends {}",
        names.join(", "),
        packages.join(" ")
    ))
}

/// A program to be run.
pub(super) struct Tool<'a> {
    pub(super) command: &'a mut Command,
    /// What it says.
    pub(super) log: &'a Path,
    /// What is told of each line of its output.
    pub(super) line: &'a mut dyn FnMut(&[u8]),
}

impl Tool<'_> {
    pub(super) fn run(self) -> Result<(), String> {
        let name = name(self.command);
        let interrupted = interrupted()?;
        let in_log = |why| format!("{}: {why}", self.log.display());
        let mut log = File::create(self.log).map_err(in_log)?;
        let errors = log.try_clone().map_err(in_log)?;
        let (mut said, output) = std::io::pipe().map_err(|why| format!("{name}: {why}"))?;
        self.command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let mut tool = self.command.spawn().map_err(|why| format!("{name}: {why}"))?;
        // What is left of our side of the pipe would keep it open.
        self.command.stdout(Stdio::null()).stderr(Stdio::null());
        for line in BufReader::new(&mut said).split(b'\n') {
            let line = line.map_err(|why| format!("{name}: {why}"))?;
            log.write_all(&[&line[..], b"\n"].concat()).map_err(in_log)?;
            (self.line)(&line);
            if interrupted.load(Ordering::Relaxed) {
                // It ends with us.
                return Err(INTERRUPTED.to_owned());
            }
        }
        let status = tool.wait().map_err(|why| format!("{name}: {why}"))?;
        if status.success() {
            return Ok(());
        }
        // A terminal's Ctrl-C reaches it as well.
        if interrupted.load(Ordering::Relaxed) {
            return Err(INTERRUPTED.to_owned());
        }
        let said = std::fs::read(self.log).map_err(in_log)?;
        Err(failed(&format!("{name}: {status}"), &String::from_utf8_lossy(&said), self.log))
    }
}

/// A program's name; of one that is to end with us too.
fn name(command: &Command) -> String {
    let mut arguments = command.get_args();
    let name = match command.get_program() {
        program if program == "setpriv" => arguments.nth(2).unwrap_or(program),
        program => program,
    };
    name.display().to_string()
}

/// A program that ends when we do, however that is.
pub(super) fn ends_with_us(signal: &'static str, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, program]);
    command
}

/// What a program failed with: its errors, or else the last that it said. The first of it is in the
/// first line.
fn failed(what: &str, said: &str, log: &Path) -> String {
    let is_error = |line: &&str| {
        let line = line.to_lowercase();
        line.contains("error") || line.starts_with("e: ")
    };
    let errors: Vec<&str> = said.lines().filter(is_error).take(LINES).collect();
    let last: Vec<&str> = said.lines().rev().take(LINES).collect();
    let lines = if errors.is_empty() { last.into_iter().rev().collect() } else { errors };
    format!("{what}: {}\nall that it said: {}", lines.join("\n"), log.display())
}

pub(super) fn make_folder(folder: &Path) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|why| format!("{}: {why}", folder.display()))
}

pub(super) fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<(), String> {
    std::fs::write(path, contents).map_err(|why| format!("{}: {why}", path.display()))
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|why| format!("{}: {why}", path.display()))
}

/// Removes a folder, if it is there.
pub(super) fn remove(folder: &Path) -> Result<(), String> {
    match std::fs::remove_dir_all(folder) {
        Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {why}", folder.display()))
        }
        _ => Ok(()),
    }
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::rename(from, to)
        .map_err(|why| format!("{} to {}: {why}", from.display(), to.display()))
}

/// What is in a folder, by name.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let found = std::fs::read_dir(folder).map_err(|why| format!("{}: {why}", folder.display()))?;
    let mut entries: Vec<_> = found.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    Ok(entries)
}

/// Waits until nobody else is at something, and keeps it so.
pub(super) fn alone(lock: &Path, at: &str) -> Result<File, String> {
    let in_lock = |why: std::io::Error| format!("{}: {why}", lock.display());
    let file = File::create(lock).map_err(in_lock)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("lab: somebody else is at {at}: waiting");
            file.lock().map_err(in_lock)?;
        }
        Err(TryLockError::Error(why)) => return Err(in_lock(why)),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_named_with_its_package() {
        let needs = [("sh", "dash"), ("no-such-program", "a-package")];
        let why = missing(&needs, "it").unwrap_err();
        assert!(why.contains("no-such-program") && why.ends_with(" a-package"), "{why}");
        assert_eq!(missing(&needs[..1], "it"), Ok(()));
    }

    #[test]
    fn what_failed_says_its_errors_or_else_the_end() {
        let log = Path::new("log");
        let said = "  CC a.o\na.c:1: error: no\n  CC b.o\nmake: *** Error 1\n  CC c.o\n";
        let why = failed("make: exit status: 2", said, log);
        let errors = "make: exit status: 2: a.c:1: error: no\nmake: *** Error 1\n";
        assert_eq!(why, format!("{errors}all that it said: log"));
        let many: String = (0..20).map(|n| format!("{n}\n")).collect();
        let why = failed("make", &many, log);
        assert!(why.starts_with("make: 12\n13\n") && why.contains("\n19\nall"), "{why}");
    }

    #[test]
    fn lines_are_told_and_kept_and_a_failure_is_one() {
        let log = std::env::temp_dir().join(format!("polder-tool-{}", std::process::id()));
        let mut lines = Vec::new();
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo one; echo two; echo bad >&2; exit 3"]);
        let run = Tool { command: &mut shell, log: &log, line: &mut |l| lines.push(l.to_vec()) };
        let why = run.run().unwrap_err();
        let _ = std::fs::remove_file(&log);
        assert_eq!(lines, [b"one", b"two"]);
        assert!(why.contains("exit status: 3") && why.contains("bad"), "{why}");
    }
}
