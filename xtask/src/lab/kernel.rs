//! The lab's kernel: where its image is, or how it comes to be.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::guest::missing;

/// Debian's package of the kernel's source, and where it is found.
const PACKAGE: &str = "linux-source-7.3";
const SUITE: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What the kernel has.
const FRAGMENT: &str = include_str!("../../lab/config-fragment");
/// After how many files the build says where it is.
const PROGRESS: usize = 200;

/// The image: `POLDER_KERNEL`, or the one in `lab`, which is built if it is not there or not of
/// the configuration that it should be of.
pub(super) fn image(lab: &Path) -> Result<PathBuf, String> {
    if let Some(given) = std::env::var_os("POLDER_KERNEL").filter(|given| !given.is_empty()) {
        let given = PathBuf::from(given);
        let found = given.is_file();
        return found.then(|| given.clone()).ok_or(format!(
            "POLDER_KERNEL names {}, which is no file; unset it to have a kernel built",
            given.display()
        ));
    }
    let (image, fragment) = (lab.join("bzImage"), lab.join("config-fragment"));
    let current = std::fs::read_to_string(&fragment).is_ok_and(|built| built == FRAGMENT);
    if !(current && image.is_file()) {
        let build = Build { folder: lab.join("kernel"), log: lab.join("kernel.log") };
        build.run(&image)?;
        std::fs::write(&fragment, FRAGMENT).map_err(|why| format!("{fragment:?}: {why}"))?;
    }
    Ok(image)
}

/// A build of the kernel.
struct Build {
    /// Where it is done. It is removed afterwards, unless it failed.
    folder: PathBuf,
    /// What the tools say.
    log: PathBuf,
}

impl Build {
    fn run(&self, image: &Path) -> Result<(), String> {
        needs()?;
        eprintln!("lab: no kernel yet: one is built, once, in some ten minutes (3 GB of disk)");
        remove(&self.folder)?;
        let source = self.fetch()?;
        let out = self.folder.join("out");
        self.configure(&source, &out)?;
        eprintln!("lab: kernel 4/4: compiling (some 1500 files)");
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.step(make(&source, &out).arg(format!("-j{cpus}")).arg("bzImage"))?;
        let built = out.join("arch/x86/boot/bzImage");
        std::fs::copy(&built, image).map_err(|why| format!("{}: {why}", built.display()))?;
        remove(&self.folder)?;
        eprintln!("lab: the kernel is {}", image.display());
        Ok(())
    }

    /// Debian's source, unpacked: from the mirror that this machine takes Debian from, by lists of
    /// our own, so that the machine's own sources stay as they are.
    fn fetch(&self) -> Result<PathBuf, String> {
        eprintln!("lab: kernel 1/4: fetching Debian's {PACKAGE} (170 MB)");
        for part in ["lists/partial", "cache/archives/partial", "package"] {
            let folder = self.folder.join(part);
            std::fs::create_dir_all(&folder).map_err(|why| format!("{folder:?}: {why}"))?;
        }
        let list = self.folder.join("sources.list");
        let line = format!("deb [signed-by={KEYRING}] {} {SUITE} main\n", mirror()?);
        std::fs::write(&list, line).map_err(|why| format!("{}: {why}", list.display()))?;
        self.step(self.apt().arg("update"))?;
        self.step(self.apt().args(["download", PACKAGE]))?;
        eprintln!("lab: kernel 2/4: unpacking");
        let deb = only(&self.folder, ".deb")?;
        self.step(Command::new("dpkg-deb").arg("-x").arg(deb).arg(self.folder.join("package")))?;
        let tar = only(&self.folder.join("package/usr/src"), ".tar.xz")?;
        self.step(Command::new("tar").arg("-xf").arg(tar).arg("-C").arg(&self.folder))?;
        only(&self.folder, PACKAGE)
    }

    fn apt(&self) -> Command {
        let mut apt = Command::new("apt-get");
        let at = |name: &str| self.folder.join(name).display().to_string();
        apt.arg("-o").arg(format!("Dir::Etc::SourceList={}", at("sources.list")));
        apt.args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
        apt.arg("-o").arg(format!("Dir::State::Lists={}", at("lists")));
        apt.arg("-o").arg(format!("Dir::Cache={}", at("cache")));
        // Root's apt otherwise gives up its rights first, and can't write here.
        apt.args(["-o", "APT::Sandbox::User=root", "-q"]).current_dir(&self.folder);
        apt
    }

    /// The least of kernels, and on it what the fragment says.
    fn configure(&self, source: &Path, out: &Path) -> Result<(), String> {
        eprintln!("lab: kernel 3/4: configuring");
        std::fs::create_dir_all(out).map_err(|why| format!("{}: {why}", out.display()))?;
        self.step(make(source, out).arg("tinyconfig"))?;
        let config = out.join(".config");
        let read = || std::fs::read_to_string(&config);
        let tiny = read().map_err(|why| format!("{}: {why}", config.display()))?;
        // Of two lines for one option, Kconfig takes the last.
        std::fs::write(&config, tiny + FRAGMENT)
            .map_err(|why| format!("{}: {why}", config.display()))?;
        self.step(make(source, out).arg("olddefconfig"))?;
        let configured = read().map_err(|why| format!("{}: {why}", config.display()))?;
        let lost = lost(&configured);
        if lost.is_empty() { Ok(()) } else { Err(format!("the kernel has no {}", lost.join(", "))) }
    }

    /// Runs a tool, with what it says in the log, and tells now and then how far it is.
    fn step(&self, command: &mut Command) -> Result<(), String> {
        let log = std::fs::File::create(&self.log);
        let mut log = log.map_err(|why| format!("{}: {why}", self.log.display()))?;
        let errors = log.try_clone().map_err(|why| format!("{}: {why}", self.log.display()))?;
        let name = command.get_program().display().to_string();
        let mut tool = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(|why| format!("{name}: {why}"))?;
        let mut files = 0;
        for line in
            BufReader::new(tool.stdout.take().into_iter().next().ok_or("a pipe")?).split(b'\n')
        {
            let line = line.map_err(|why| format!("{name}: {why}"))?;
            let written = std::io::Write::write_all(&mut log, &[&line[..], b"\n"].concat());
            written.map_err(|why| format!("{}: {why}", self.log.display()))?;
            files += usize::from(line.starts_with(b"  CC "));
            if line.starts_with(b"  CC ") && files % PROGRESS == 0 {
                eprintln!("lab: kernel: {files} files");
            }
        }
        let status = tool.wait().map_err(|why| format!("{name}: {why}"))?;
        let log = self.log.display();
        if status.success() { Ok(()) } else { Err(format!("{name}: {status}; see {log}")) }
    }
}

/// What a kernel is built with.
fn needs() -> Result<(), String> {
    let programs = [
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
        ("xz", "xz-utils"),
        ("make", "make"),
        ("gcc", "gcc"),
        ("flex", "flex"),
        ("bison", "bison"),
        ("bc", "bc"),
    ];
    missing(&programs, "building a kernel")?;
    let header = "/usr/include/libelf.h";
    let found = Path::new(header).is_file();
    found
        .then_some(())
        .ok_or(format!("building a kernel needs {header}: apt-get install libelf-dev"))
}

fn make(source: &Path, out: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-C").arg(source).arg(format!("O={}", out.display()));
    make
}

/// Where this machine takes Debian from.
fn mirror() -> Result<String, String> {
    let asked = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)"])
        .args(["Created-By: Packages", "Origin: Debian", "Label: Debian"])
        .output()
        .map_err(|why| format!("apt-get indextargets: {why}"))?;
    let mirrors = String::from_utf8_lossy(&asked.stdout).into_owned();
    let first = mirrors.lines().next().map(str::to_owned);
    first.ok_or_else(|| {
        "apt knows no mirror of Debian: apt-get update, or name a kernel by POLDER_KERNEL"
            .to_owned()
    })
}

/// The one file or folder whose name begins or ends so.
fn only(folder: &Path, part: &str) -> Result<PathBuf, String> {
    let entries =
        std::fs::read_dir(folder).map_err(|why| format!("{}: {why}", folder.display()))?;
    let mut named = entries.flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(part) || (path.is_dir() && name.starts_with(part))
    });
    named.next().ok_or_else(|| format!("{}: nothing named {part}", folder.display()))
}

fn remove(folder: &Path) -> Result<(), String> {
    match std::fs::remove_dir_all(folder) {
        Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {why}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The options of the fragment that a configuration did not take, as Kconfig drops in silence what
/// depends on something that is not there.
fn lost(configured: &str) -> Vec<&'static str> {
    let options = FRAGMENT.lines().filter(|line| line.starts_with("CONFIG_"));
    options
        .filter(|option| match option.strip_suffix("=n") {
            Some(name) => configured.lines().any(|line| line == format!("{name}=y")),
            None => !configured.lines().any(|line| line == *option),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_fragment_is_an_option_or_a_comment_and_none_is_twice() {
        let mut names = std::collections::BTreeSet::new();
        for line in FRAGMENT.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, _) = line.split_once('=').unwrap();
            assert!(name.starts_with("CONFIG_") && names.insert(name), "{line}");
        }
    }

    #[test]
    fn an_option_that_was_not_taken_is_named() {
        assert_eq!(lost(FRAGMENT), [""; 0]);
        let without = FRAGMENT.replace("CONFIG_KVM_AMD=y\n", "# CONFIG_KVM_AMD is not set\n");
        assert_eq!(lost(&without), ["CONFIG_KVM_AMD=y"]);
        assert!(lost(&FRAGMENT.replace("BASE=n", "BASE=y")).contains(&"CONFIG_RANDOMIZE_BASE=n"));
    }
}
