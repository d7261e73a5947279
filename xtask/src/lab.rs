//! `cargo xtask lab`: runs a command in a Linux whose KVM enforces private memory (`docs/lab.md`).
//!
//! The kernel ([`kernel`]) is booted by QEMU, which emulates each instruction, those of AMD's
//! virtualization too ([`guest`]). It starts from an archive made for the one run
//! ([`initramfs`]) and sees the files of this machine, so that what cargo built runs there as it
//! is.

mod apt;
mod arguments;
mod guest;
pub(crate) mod holding;
mod initramfs;
mod kernel;
mod kernels_page;
mod matrix;
mod packaged;
mod table;
mod tool;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use arguments::Arguments;
use guest::{Guest, Kernel, Taker};

/// The exit status where the lab failed, rather than the command in it.
const LAB_FAILED: u8 = 125;

/// How many times slower than outside a program runs, at most: what waits there is to wait so many
/// times longer.
const SLOW: &str = "10";

/// What the command is told of the environment; with what begins with `POLDER_` and `RUST_`.
const PASSED_ON: [&str; 3] = ["HOME", "LANG", "PATH"];

pub(crate) fn main(root: &Path) -> ExitCode {
    match run(root) {
        Ok(status) => ExitCode::from(status),
        Err(why) => {
            eprintln!("lab: {why}");
            ExitCode::from(LAB_FAILED)
        }
    }
}

fn run(root: &Path) -> Result<u8, String> {
    let arguments = Arguments::parse(std::env::args_os().skip(2))?;
    guest::needs()?;
    let root = root.canonicalize().map_err(|error| format!("{}: {error}", root.display()))?;
    let mut lab = Lab { target: target(&root)?, root, arguments };
    if lab.arguments.matrix {
        return matrix::run(&lab);
    }
    let kernel = lab.kernel()?;
    if lab.arguments.command.is_empty() {
        lab.arguments.gigantic = lab.arguments.gigantic.max(table::GIGANTIC);
    }
    match lab.arguments.command.as_slice() {
        [] => table::run(&lab, &kernel),
        command => lab.run(&kernel, None, command, &mut |bytes| {
            // Who does not want to read on is not our affair.
            let _ = std::io::stdout().write_all(bytes);
            let _ = std::io::stdout().flush();
        }),
    }
}

/// Where commands can be run, and how.
struct Lab {
    root: PathBuf,
    target: PathBuf,
    arguments: Arguments,
}

impl Lab {
    /// What is the lab's alone.
    fn folder(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// The kernel with private memory.
    fn kernel(&self) -> Result<Kernel, String> {
        let image = kernel::image(&self.folder())?;
        Ok(Kernel { image, modules: Vec::new() })
    }

    /// The programs that the lab runs, optimized: the emulation is slow enough.
    fn build(&self) -> Result<(), String> {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "-p", "polder-behaviour", "-p", "polder-cli"])
            .args(["-p", "polder-differential"])
            .current_dir(&self.root)
            .status()
            .map_err(|error| format!("cargo build: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("cargo build: {status}")) }
    }

    /// Builds a test of a package, optimized; where it is.
    fn test(&self, package: &str, test: &str) -> Result<OsString, String> {
        let built = Command::new(env!("CARGO"))
            .args(["test", "--no-run", "--release", "--quiet", "--message-format=json"])
            .args(["-p", package, "--test", test])
            .current_dir(&self.root)
            .stderr(std::process::Stdio::inherit())
            .output()
            .map_err(|error| format!("cargo test: {error}"))?;
        let lines = String::from_utf8_lossy(&built.stdout);
        let made = lines.lines().filter_map(|line| serde_json::from_str(line).ok());
        let mut made = made.filter_map(|line: serde_json::Value| {
            let is_it = line["target"]["name"] == test;
            line["executable"].as_str().filter(|_| is_it).map(OsString::from)
        });
        made.next_back().ok_or_else(|| format!("cargo test built no {test} of {package}"))
    }

    /// One of them.
    fn program(&self, name: &str) -> OsString {
        self.target.join("release").join(name).into_os_string()
    }

    /// Runs a command in a kernel booted for it, and returns its exit status. What it writes to
    /// its standard output `out` gets. That it still runs is told now and then, if it is said
    /// whose command it is.
    fn run(
        &self,
        kernel: &Kernel,
        whose: Option<&str>,
        command: &[OsString],
        out: Taker<'_>,
    ) -> Result<u8, String> {
        let here = std::env::current_dir().map_err(|error| format!("this folder: {error}"))?;
        let writable = self.folder().join("work");
        std::fs::create_dir_all(&writable)
            .map_err(|error| format!("{}: {error}", writable.display()))?;
        let guest = Guest {
            kernel,
            patience: whose,
            cpus: self.arguments.cpus,
            memory: self.arguments.memory,
            gigantic: self.arguments.gigantic,
            timeout: self.arguments.timeout,
            script: script(&here, std::env::vars_os(), command),
            shown: vec![self.root.clone(), self.target.clone(), here],
            writable,
        };
        guest.run(out)
    }
}

/// What the shell in the lab runs.
fn script(
    folder: &Path,
    environment: impl Iterator<Item = (OsString, OsString)>,
    command: &[OsString],
) -> Vec<u8> {
    let mut script = format!("export POLDER_SLOW={SLOW}\n").into_bytes();
    for (name, value) in environment {
        let name = name.as_bytes();
        let ours = name.starts_with(b"POLDER_") || name.starts_with(b"RUST_");
        let plain = name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_');
        if plain && (ours || PASSED_ON.iter().any(|passed| passed.as_bytes() == name)) {
            script.extend([b"export ", name, b"=", &quoted(&value), b"\n"].concat());
        }
    }
    script.extend([b"cd ", quoted(folder.as_os_str()).as_slice(), b" && exec"].concat());
    for word in command {
        script.extend([b" ", quoted(word).as_slice()].concat());
    }
    script
}

/// One word of the shell's, whatever is in it.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in OsString::from(word).into_vec() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// Where cargo builds.
fn target(root: &Path) -> Result<PathBuf, String> {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let target = metadata["target_directory"].as_str();
    Ok(target.ok_or("cargo metadata names no target directory")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        for word in ["", "plain", "two words", "it's", "$HOME `id` \\ \"", "a\nb"] {
            let command = [b"printf %s ", quoted(OsStr::new(word)).as_slice()].concat();
            let shell = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&command)).output();
            assert_eq!(shell.unwrap().stdout, word.as_bytes());
        }
    }

    #[test]
    fn the_script_passes_on_what_is_ours_and_runs_the_command_where_we_are() {
        let environment = [("POLDER_SEEDS", "2"), ("SECRET", "x"), ("POLDER_A;B", "x")];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let command = ["echo".into(), "it's".into()];
        let script = script(Path::new("/a b"), environment.into_iter(), &command);
        assert_eq!(
            String::from_utf8(script).unwrap(),
            "export POLDER_SLOW=10\nexport POLDER_SEEDS='2'\ncd '/a b' && exec 'echo' 'it'\\''s'"
        );
    }
}
