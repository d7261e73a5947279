//! Kernels that Debian packages: fetched once, and kept as the image and the modules that the lab
//! needs of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::{self, Apt, Package, Suite, newest};
use super::guest::Kernel;
use super::tool::{self, missing};

/// A kernel that Debian packages, by the series of which the newest is taken.
pub(super) struct Packaged {
    pub(super) series: &'static str,
    suite: Suite,
}

/// Those that the lab is run on: the long-term ones since `guest_memfd` came, and a late one.
pub(super) const PACKAGED: [Packaged; 3] = [
    Packaged { series: "6.12", suite: apt::SECURITY },
    Packaged { series: "6.18", suite: apt::BACKPORTS },
    Packaged { series: "7.2", suite: apt::BACKPORTS },
];

/// What isn't built in: the outer machine's files, entropy, and KVM. Whatever else these need comes
/// before them.
const MODULES: [&str; 4] = ["9pnet_virtio", "9p", "virtio_rng", "kvm_amd"];

const MEGABYTE: u64 = 1_000_000;

impl Packaged {
    /// The kernel, and the package that it is of. It is fetched if `kernels` has it not.
    pub(super) fn kernel(&self, kernels: &Path) -> Result<(Kernel, String), String> {
        let folder = kernels.join(self.series);
        if !folder.is_dir() {
            self.fetch(kernels, &folder)?;
        }
        let package = tool::read(&folder.join("package"))?;
        let kernel = Kernel {
            image: folder.join("vmlinuz"),
            modules: tool::entries(&folder.join("modules"))?,
        };
        Ok((kernel, String::from_utf8_lossy(&package).trim().to_owned()))
    }

    fn fetch(&self, kernels: &Path, folder: &Path) -> Result<(), String> {
        missing(&[("xz", "xz-utils")], "unpacking modules")?;
        let part = kernels.join(format!("{}.part", self.series));
        let apt = Apt::update(kernels.join(self.suite.name), self.suite)?;
        let packages = apt.packages()?;
        let image = image(&packages, self.series)
            .ok_or_else(|| format!("{} has no Linux {}", self.suite.name, self.series))?;
        let tree = part.join("tree");
        tool::remove(&tree)?;
        for package in with_parts(&packages, image) {
            let size = package.bytes.div_ceil(MEGABYTE);
            eprintln!("lab: {}: fetching {} ({size} MB)", self.series, package.name);
            let deb = apt.download(package, &part)?;
            apt::unpack(&deb, &tree, &part.join("log"))?;
        }
        eprintln!("lab: {}: taking the modules out", self.series);
        let whole = part.join("whole");
        tool::remove(&whole)?;
        take_out(&tree, &whole)?;
        tool::write(&whole.join("package"), format!("{} {}", image.name, image.version))?;
        tool::rename(&whole, folder)?;
        tool::remove(&part)
    }
}

/// The newest image of a series.
fn image<'a>(packages: &'a [Package], series: &str) -> Option<&'a Package> {
    newest(packages, |package| {
        let version = package.name.strip_prefix(&format!("linux-image-{series}."));
        let version = version.and_then(|rest| rest.strip_suffix("-amd64"));
        // Not `-cloud` or `-rt`, and not what has no version of its own.
        version.is_some_and(|version| !version.contains('-'))
    })
}

/// A package of an image, and those into which later ones are split.
fn with_parts<'a>(packages: &'a [Package], image: &'a Package) -> Vec<&'a Package> {
    let is_part = |name: &str| {
        let parts = ["linux-base-", "linux-binary-", "linux-modules-"];
        let mut versions = parts.iter().filter_map(|part| name.strip_prefix(part));
        versions.any(|version| image.name.ends_with(version))
    };
    let parts = image.depends.iter().filter(|name| is_part(name));
    let parts = parts.filter_map(|name| {
        newest(packages, |package| package.name == *name && package.version == image.version)
    });
    std::iter::once(image).chain(parts).collect()
}

/// Copies the image and the modules, in the order in which they are to be loaded.
fn take_out(tree: &Path, to: &Path) -> Result<(), String> {
    let mut files = Vec::new();
    walk(tree, &mut files)?;
    let named = |start: &str| {
        let mut found = files.iter().filter(|path| name(path).starts_with(start));
        found.next().ok_or_else(|| format!("the package has no {start}"))
    };
    tool::make_folder(&to.join("modules"))?;
    tool::write(&to.join("vmlinuz"), tool::read(named("vmlinuz")?)?)?;
    let built_in = String::from_utf8_lossy(&tool::read(named("modules.builtin")?)?).into_owned();
    let built_in: Vec<String> =
        built_in.lines().filter_map(|line| module(Path::new(line))).collect();
    let modules: BTreeMap<String, &PathBuf> =
        files.iter().filter_map(|path| Some((module(path)?, path))).collect();

    let mut contents = BTreeMap::new();
    let order = order(&MODULES, &mut |wanted| {
        if built_in.iter().any(|built_in| built_in == wanted) {
            return Ok(None);
        }
        let path = modules.get(wanted).ok_or_else(|| format!("the package has no {wanted}.ko"))?;
        let bytes = uncompressed(path)?;
        let depends = depends(&bytes);
        contents.insert(wanted.to_owned(), bytes);
        Ok(Some(depends))
    })?;
    for (number, module) in order.iter().enumerate() {
        tool::write(&to.join(format!("modules/{number:02}-{module}.ko")), &contents[module])?;
    }
    Ok(())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    for path in tool::entries(folder)? {
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() { walk(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

fn name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

/// A module's name, if a file is one. The kernel takes `-` and `_` for the same.
fn module(path: &Path) -> Option<String> {
    let name = name(path);
    let name = name.strip_suffix(".xz").unwrap_or(&name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

fn uncompressed(path: &Path) -> Result<Vec<u8>, String> {
    if path.extension().is_some_and(|kind| kind == "ko") {
        return tool::read(path);
    }
    let xz =
        Command::new("xz").arg("-dc").arg(path).output().map_err(|why| format!("xz: {why}"))?;
    let path = path.display();
    if xz.status.success() { Ok(xz.stdout) } else { Err(format!("xz: {path}: {}", xz.status)) }
}

/// What a module says that it needs: a string of its section `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let mut strings = module.split(|byte| *byte == 0);
    let value = strings.find_map(|string| string.strip_prefix(KEY)).unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// What tells what a module needs, or `None` of one that is built in.
type Needs<'a> = &'a mut dyn FnMut(&str) -> Result<Option<Vec<String>>, String>;

/// Modules in an order in which each comes after what it needs.
fn order(wanted: &[&str], needs: Needs<'_>) -> Result<Vec<String>, String> {
    let (mut seen, mut order) = (Vec::new(), Vec::new());
    for module in wanted {
        place(module, needs, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn place(
    module: &str,
    needs: Needs<'_>,
    seen: &mut Vec<String>,
    order: &mut Vec<String>,
) -> Result<(), String> {
    if seen.iter().any(|seen| seen == module) {
        return Ok(());
    }
    seen.push(module.to_owned());
    if let Some(first) = needs(module)? {
        for module in first {
            place(&module, needs, seen, order)?;
        }
        order.push(module.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, depends: &[&str]) -> Package {
        let depends = depends.iter().map(|name| (*name).to_owned()).collect();
        Package { name: name.to_owned(), version: version.to_owned(), depends, bytes: 1 }
    }

    #[test]
    fn the_newest_plain_image_of_a_series_is_taken() {
        let packages = [
            package("linux-image-7.2.9+deb13-amd64", "7.2.9-1", &[]),
            package("linux-image-7.2.12+deb13-amd64", "7.2.12-1", &[]),
            package("linux-image-7.2.13+deb13-cloud-amd64", "7.2.13-1", &[]),
            package("linux-image-7.21.1+deb13-amd64", "7.21.1-1", &[]),
            package("linux-image-7.2-amd64", "7.2.14-1", &[]),
        ];
        assert_eq!(image(&packages, "7.2"), Some(&packages[1]));
        assert_eq!(image(&packages, "6.12"), None);
    }

    #[test]
    fn an_image_that_is_split_comes_with_its_parts() {
        let parts = ["kmod", "linux-modules-7.2.9-amd64", "linux-base"];
        let packages = [
            package("linux-image-7.2.9-amd64", "7.2.9-1", &parts),
            package("linux-modules-7.2.9-amd64", "7.2.9-1", &[]),
            package("linux-modules-7.2.9-amd64", "7.2.9-2", &[]),
            package("linux-base", "7.2.9-1", &[]),
        ];
        assert_eq!(with_parts(&packages, &packages[0]), [&packages[0], &packages[1]]);
        assert_eq!(with_parts(&packages, &packages[3]), [&packages[3]]);
    }

    #[test]
    fn a_module_comes_after_what_it_needs_and_once() {
        let order = order(&["9p", "kvm_amd"], &mut |module| {
            Ok(match module {
                "9p" => Some(vec!["9pnet".into(), "netfs".into()]),
                "kvm_amd" => Some(vec!["ccp".into(), "kvm".into()]),
                "kvm" => Some(vec!["9pnet".into()]),
                "ccp" => None,
                _ => Some(Vec::new()),
            })
        });
        assert_eq!(order.unwrap(), ["9pnet", "netfs", "9p", "kvm", "kvm_amd"]);
    }

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(depends(b"\x7fELF\0license=GPL\0depends=ccp,kvm-x\0name=a\0"), ["ccp", "kvm_x"]);
        assert_eq!(depends(b"\0depends=\0"), [""; 0]);
        assert_eq!(depends(b""), [""; 0]);
    }

    #[test]
    fn a_file_is_a_module_by_its_name() {
        assert_eq!(module(Path::new("/a/kvm-amd.ko.xz")), Some("kvm_amd".to_owned()));
        assert_eq!(module(Path::new("kernel/virtio.ko")), Some("virtio".to_owned()));
        assert_eq!(module(Path::new("modules.order")), None);
    }
}
