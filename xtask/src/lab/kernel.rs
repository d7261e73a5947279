//! The lab's kernel: where its image is, or how it comes to be.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::{self, Apt, newest};
use super::tool::{self, Tool, missing};

/// Debian's package of the kernel's source.
const PACKAGE: &str = "linux-source-7.3";
/// What the kernel has.
const FRAGMENT: &str = include_str!("../../lab/config-fragment");
/// After how many files the build says where it is.
const PROGRESS: usize = 100;
/// How many files there are, about.
const FILES: usize = 1500;

/// The image: `POLDER_KERNEL`, or the one in `lab`, which is built if it is not there or not of
/// the configuration that it should be of.
pub(super) fn image(lab: &Path) -> Result<PathBuf, String> {
    if let Some(given) = given() {
        let found = given.is_file();
        return found.then(|| given.clone()).ok_or(format!(
            "POLDER_KERNEL names {}, which is no file; unset it to have a kernel built",
            given.display()
        ));
    }
    tool::make_folder(lab)?;
    let _alone = tool::alone(&lab.join("kernel.lock"), "the kernel")?;
    let (image, fragment) = (lab.join("bzImage"), lab.join("config-fragment"));
    let current = std::fs::read_to_string(&fragment).is_ok_and(|built| built == FRAGMENT);
    if !(current && image.is_file()) {
        let build = Build { folder: lab.join("kernel"), log: lab.join("kernel.log") };
        build.run(&image).map_err(|why| {
            let folder = build.folder.display();
            format!(
                "no kernel: {why}\nthe same command again goes on where this ended; without {folder} \
                 it begins anew; POLDER_KERNEL=FILE names a kernel that is there"
            )
        })?;
        tool::write(&fragment, FRAGMENT)?;
    }
    Ok(image)
}

/// The kernel that the caller names, rather than have one built.
pub(super) fn given() -> Option<PathBuf> {
    std::env::var_os("POLDER_KERNEL").filter(|given| !given.is_empty()).map(PathBuf::from)
}

/// A build of the kernel. What is done of it stays in the folder until all is, and is not done
/// again: a step's result has its name only once it is whole.
struct Build {
    folder: PathBuf,
    /// What the tools say.
    log: PathBuf,
}

impl Build {
    fn run(&self, image: &Path) -> Result<(), String> {
        needs()?;
        eprintln!("lab: no kernel yet: one is built, once, in some ten minutes (3 GB of disk)");
        let (source, out) = (self.folder.join("source"), self.folder.join("out"));
        if !source.is_dir() {
            self.fetch(&source)?;
        }
        self.configure(&source, &out)?;
        eprintln!("lab: kernel 4/4: compiling");
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let mut files = 0;
        let mut make = make(&source, &out);
        make.arg(format!("-j{cpus}")).arg("bzImage");
        let mut count = |line: &[u8]| {
            files += usize::from(line.starts_with(b"  CC "));
            if line.starts_with(b"  CC ") && files % PROGRESS == 0 {
                eprintln!("lab: kernel 4/4: {files} of some {FILES} files");
            }
        };
        Tool { command: &mut make, log: &self.log, line: &mut count }.run()?;
        // By another name first: an image that is there is whole.
        let (built, copy) = (out.join("arch/x86/boot/bzImage"), image.with_extension("new"));
        std::fs::copy(&built, &copy).map_err(|why| format!("{}: {why}", built.display()))?;
        tool::rename(&copy, image)?;
        tool::remove(&self.folder)?;
        eprintln!("lab: the kernel is {}", image.display());
        Ok(())
    }

    /// Debian's source, unpacked.
    fn fetch(&self, source: &Path) -> Result<(), String> {
        eprintln!("lab: kernel 1/4: fetching Debian's {PACKAGE} (170 MB)");
        let apt = Apt::update(self.folder.join("apt"), apt::BACKPORTS)?;
        let packages = apt.packages()?;
        let package = newest(&packages, |package| package.name == PACKAGE)
            .ok_or_else(|| format!("{} has no {PACKAGE}", apt::BACKPORTS.name))?;
        let deb = apt.download(package, &self.folder)?;
        eprintln!("lab: kernel 2/4: unpacking {} {}", package.name, package.version);
        let part = self.folder.join("unpacking");
        tool::remove(&part)?;
        apt::unpack(&deb, &part, &self.log)?;
        let tar = part.join(format!("usr/src/{PACKAGE}.tar.xz"));
        self.step(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&part))?;
        tool::rename(&part.join(PACKAGE), source)?;
        tool::remove(&part)
    }

    /// The least of kernels, and on it what the fragment says.
    fn configure(&self, source: &Path, out: &Path) -> Result<(), String> {
        eprintln!("lab: kernel 3/4: configuring");
        tool::make_folder(out)?;
        self.step(make(source, out).arg("tinyconfig"))?;
        let config = out.join(".config");
        let tiny = tool::read(&config)?;
        // Of two lines for one option, Kconfig takes the last.
        tool::write(&config, [&tiny, FRAGMENT.as_bytes()].concat())?;
        self.step(make(source, out).arg("olddefconfig"))?;
        let lost = lost(&String::from_utf8_lossy(&tool::read(&config)?));
        if lost.is_empty() { Ok(()) } else { Err(format!("it would lack {}", lost.join(", "))) }
    }

    fn step(&self, command: &mut Command) -> Result<(), String> {
        Tool { command, log: &self.log, line: &mut |_| () }.run()
    }
}

/// What a kernel is built with.
fn needs() -> Result<(), String> {
    let programs = [
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

/// However we end, make ends with us; at this signal, what it runs ends with it.
fn make(source: &Path, out: &Path) -> Command {
    let mut make = tool::ends_with_us("TERM", "make");
    make.arg("-C").arg(source).arg(format!("O={}", out.display()));
    make
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
