//! Debian's packages, by lists of our own: from the mirrors that this machine takes Debian from,
//! whichever suites its own sources name. Those stay as they are.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tool::{self, Tool, missing};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A part of an archive of Debian's.
#[derive(Clone, Copy)]
pub(super) struct Suite {
    pub(super) name: &'static str,
    /// The label that the archive has.
    pub(super) archive: &'static str,
}

pub(super) const BACKPORTS: Suite = Suite { name: "trixie-backports", archive: "Debian" };
pub(super) const SECURITY: Suite = Suite { name: "bookworm-security", archive: "Debian-Security" };

/// A package that can be had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// Of the packages that it depends on, the first alternative of each.
    pub(super) depends: Vec<String>,
    pub(super) bytes: u64,
}

/// apt with the lists of one suite.
pub(super) struct Apt {
    folder: PathBuf,
    log: PathBuf,
}

impl Apt {
    /// Asks the suite's mirror what there is. `folder` is the lists' and the log's.
    pub(super) fn update(folder: PathBuf, suite: Suite) -> Result<Self, String> {
        missing(&[("apt-get", "apt"), ("dpkg-deb", "dpkg")], "fetching from Debian")?;
        for part in ["lists/partial", "cache/archives/partial"] {
            tool::make_folder(&folder.join(part))?;
        }
        let line = format!("deb [signed-by={KEYRING}] {} {} main\n", mirror(suite)?, suite.name);
        tool::write(&folder.join("sources.list"), line)?;
        let apt = Self { log: folder.join("apt.log"), folder };
        apt.run(apt.command("apt-get").args([
            "-q",
            "update",
            "-o",
            "APT::Update::Error-Mode=any",
        ]))?;
        Ok(apt)
    }

    pub(super) fn packages(&self) -> Result<Vec<Package>, String> {
        let asked = self.command("apt-cache").arg("dumpavail").output();
        let asked = asked.map_err(|why| format!("apt-cache: {why}"))?;
        if !asked.status.success() {
            return Err(format!("apt-cache dumpavail: {}", asked.status));
        }
        Ok(packages(&String::from_utf8_lossy(&asked.stdout)))
    }

    /// Fetches a package into a folder; one that is there already whole is left.
    pub(super) fn download(&self, package: &Package, into: &Path) -> Result<PathBuf, String> {
        tool::make_folder(into)?;
        let which = format!("{}={}", package.name, package.version);
        self.run(self.command("apt-get").args(["-q", "download", &which]).current_dir(into))?;
        only(into, &package.name)
    }

    fn run(&self, command: &mut Command) -> Result<(), String> {
        Tool { command, log: &self.log, line: &mut |_| () }.run()
    }

    fn command(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        let at = |name: &str| self.folder.join(name).display().to_string();
        apt.arg("-o").arg(format!("Dir::Etc::SourceList={}", at("sources.list")));
        apt.args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
        apt.arg("-o").arg(format!("Dir::State::Lists={}", at("lists")));
        apt.arg("-o").arg(format!("Dir::Cache={}", at("cache")));
        // Root's apt otherwise gives up its rights first, and can't write here.
        apt.args(["-o", "APT::Sandbox::User=root"]);
        apt
    }
}

/// The newest package of which `wanted` is true.
pub(super) fn newest(packages: &[Package], wanted: impl Fn(&Package) -> bool) -> Option<&Package> {
    let wanted = packages.iter().filter(|package| wanted(package));
    wanted.max_by(|a, b| by_version(&a.version, &b.version))
}

/// Which of two versions of one package of the kernel's is the newer. Numbers count as numbers; of
/// the rest the kernel's versions have the same at the same place.
fn by_version(a: &str, b: &str) -> Ordering {
    let numbers = |version: &str| -> Vec<u64> {
        let digits = version.split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|digits| digits.parse().ok()).collect()
    };
    numbers(a).cmp(&numbers(b))
}

/// Where this machine takes an archive of Debian's from.
fn mirror(suite: Suite) -> Result<String, String> {
    let asked = Command::new("apt-get")
        .args(["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"])
        .output()
        .map_err(|why| format!("apt-get indextargets: {why}"))?;
    let targets = String::from_utf8_lossy(&asked.stdout);
    labelled(&targets, suite.archive).ok_or_else(|| {
        let archive = suite.archive;
        format!("this machine's apt knows no mirror of the archive {archive}: apt-get update")
    })
}

/// The first address that has a label, of lines of a label and an address.
fn labelled(targets: &str, label: &str) -> Option<String> {
    let mut pairs = targets.lines().filter_map(|line| line.rsplit_once(' '));
    pairs.find(|(its, _)| *its == label).map(|(_, address)| address.to_owned())
}

/// The packages of `apt-cache dumpavail`, which stand apart by empty lines.
fn packages(text: &str) -> Vec<Package> {
    text.split("\n\n").filter_map(package).collect()
}

fn package(stanza: &str) -> Option<Package> {
    let field = |name: &str| {
        let mut values = stanza.lines().filter_map(|line| line.strip_prefix(name));
        values.next().map(|value| value.trim_start_matches(':').trim())
    };
    let first_word = |dependency: &str| dependency.split_whitespace().next().map(str::to_owned);
    Some(Package {
        name: field("Package:")?.to_owned(),
        version: field("Version:")?.to_owned(),
        depends: field("Depends:").unwrap_or("").split(',').filter_map(first_word).collect(),
        bytes: field("Size:")?.parse().ok()?,
    })
}

/// The package's file in a folder: `name_version_architecture.deb`.
fn only(folder: &Path, package: &str) -> Result<PathBuf, String> {
    let start = format!("{package}_");
    let found = tool::entries(folder)?.into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&start) && name.ends_with(".deb")
    });
    found.ok_or_else(|| format!("apt-get fetched {package}, but not to {}", folder.display()))
}

/// Unpacks a package.
pub(super) fn unpack(deb: &Path, into: &Path, log: &Path) -> Result<(), String> {
    tool::make_folder(into)?;
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.arg("-x").arg(deb).arg(into);
    Tool { command: &mut dpkg, log, line: &mut |_| () }.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVAILABLE: &str = "\
Package: linux-image-7.2.9+deb13-amd64
Source: linux-signed-amd64 (7.2.9+1~bpo13+1)
Version: 7.2.9-1~bpo13+1
Pre-Depends: linux-base (>= 4.17~)
Depends: dracut | initramfs-tools (>= 0.120), linux-modules-7.2.9+deb13-amd64 (= 7.2.9-1~bpo13+1)
Size: 1900
Description: Linux 7.2
 Package: is no field here

Package: linux-image-7.2.12+deb13-amd64
Version: 7.2.12-1~bpo13+1
Size: 2

Package: broken
";

    #[test]
    fn packages_are_read_with_what_they_depend_on() {
        let packages = packages(AVAILABLE);
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].name, "linux-image-7.2.9+deb13-amd64");
        assert_eq!((packages[0].version.as_str(), packages[0].bytes), ("7.2.9-1~bpo13+1", 1900));
        assert_eq!(packages[0].depends, ["dracut", "linux-modules-7.2.9+deb13-amd64"]);
        assert_eq!(packages[1].depends, [""; 0]);
    }

    #[test]
    fn twelve_is_newer_than_nine() {
        let packages = packages(AVAILABLE);
        let newest = newest(&packages, |package| package.name.starts_with("linux-image"));
        assert_eq!(newest.unwrap().version, "7.2.12-1~bpo13+1");
        assert_eq!(by_version("6.12.115-2~deb12u1", "6.12.115-1~deb12u1"), Ordering::Greater);
    }

    #[test]
    fn a_mirror_is_told_by_the_label_of_its_archive() {
        let targets = "Some Company http://c/\nDebian http://a/\nDebian http://other/\n\
                       Debian-Security http://b/\n";
        assert_eq!(labelled(targets, "Debian"), Some("http://a/".to_owned()));
        assert_eq!(labelled(targets, "Debian-Security"), Some("http://b/".to_owned()));
        assert_eq!(labelled("", "Debian"), None);
    }
}
