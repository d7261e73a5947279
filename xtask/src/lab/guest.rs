//! The lab's virtual machine: QEMU, its ports, and how it ends.
//!
//! A program's output, its errors, its exit status and the kernel's console each leave by a socket
//! of their own, so that none is mistaken for another.

use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::initramfs::Archive;
use super::tool::{self, missing};

const INIT: &[u8] = include_bytes!("../../lab/init");
const BUSYBOX: &str = "/bin/busybox";
const QEMU: &str = "qemu-system-x86_64";
/// How often QEMU is looked after.
const LOOK: Duration = Duration::from_millis(50);
const LOOKS_A_SECOND: u32 = 20;
/// After how many seconds somebody is told that a command still runs.
const TOLD: u32 = 20;
/// How much of the console is shown where something went wrong.
const CONSOLE_LINES: usize = 30;

/// A kernel, and what it is to load before it can run a command.
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// In this order.
    pub(super) modules: Vec<PathBuf>,
}

/// A command, and the machine it is to run on.
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Kernel,
    /// Whose command it is, if somebody wants to be told that it still runs.
    pub(super) patience: Option<&'a str>,
    /// CPUs that the command runs on. There is one more, the first, on which KVM never runs a guest,
    /// for QEMU would spoil it: when another CPU restores its floating-point state, QEMU clears a bit
    /// of the first CPU's `hflags2`, with neither lock nor atomic operation (`cpu_clear_ignne`). If
    /// that CPU leaves a guest at the same moment, its nested paging may stay on, and the host's
    /// registers end in the guest's VMCB.
    pub(super) cpus: u32,
    /// MiB.
    pub(super) memory: u32,
    /// Pages of 1G that the kernel sets aside as it boots, beside that memory.
    pub(super) gigantic: u32,
    /// Seconds.
    pub(super) timeout: u32,
    /// What its shell runs.
    pub(super) script: Vec<u8>,
    /// Folders of this machine that it must be able to read, even below `/tmp`.
    pub(super) shown: Vec<PathBuf>,
    /// The folder that it may write to.
    pub(super) writable: PathBuf,
}

/// Whether this machine has what the lab runs on.
pub(super) fn needs() -> Result<(), String> {
    let needs =
        [(QEMU, "qemu-system-x86"), ("busybox", "busybox-static"), ("setpriv", "util-linux")];
    missing(&needs, "the lab")
}

/// A processor that string instructions are slow on, so that the kernel does without: emulated, each
/// of their bytes is an instruction, and a page of 1G would take seconds to clear.
const CPU: &str = "max,+svm,+npt,-erms,-fsrm";

/// Why QEMU is no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// It ended by itself.
    Itself,
    /// We ended it: the time was over.
    Time,
    /// We ended it: somebody wants us to end.
    Interrupted,
}

impl Guest<'_> {
    /// Boots, runs the command, and returns its exit status.
    pub(super) fn run(&self, out: Taker<'_>) -> Result<u8, String> {
        let folder = Folder::new()?;
        let ports = ["console", "out", "err", "status"].map(|name| folder.0.join(name));
        let mut listeners = Vec::new();
        for port in &ports {
            let listener = UnixListener::bind(port);
            listeners.push(listener.map_err(|error| format!("{}: {error}", port.display()))?);
        }
        let initramfs = folder.0.join("initramfs");
        std::fs::write(&initramfs, self.initramfs()?)
            .map_err(|error| format!("{}: {error}", initramfs.display()))?;
        // Before there is something to end.
        let interrupted = tool::interrupted()?;
        let mut qemu = self.command(&folder.0).spawn().map_err(|why| format!("{QEMU}: {why}"))?;
        let [mut console, mut status] = [const { Vec::<u8>::new() }; 2];
        let mut to_console = |bytes: &[u8]| console.extend(bytes);
        let mut to_status = |bytes: &[u8]| status.extend(bytes);
        let mut to_err = |bytes: &[u8]| drop(std::io::stderr().write_all(bytes));
        let takers: [Taker<'_>; 4] = [&mut to_console, out, &mut to_err, &mut to_status];
        let end = std::thread::scope(|scope| {
            for (listener, take) in listeners.iter().zip(takers) {
                scope.spawn(move || stream(listener, take));
            }
            let end = watch(&mut qemu, self.timeout, self.patience, interrupted);
            // Lets go on who still waits for a QEMU that failed before it came.
            ports.iter().for_each(|port| drop(UnixStream::connect(port)));
            end
        })?;
        let console = String::from_utf8_lossy(&console);
        verdict(end, self.timeout, &String::from_utf8_lossy(&status), &console)
    }

    fn initramfs(&self) -> Result<Vec<u8>, String> {
        let busybox = std::fs::read(BUSYBOX).map_err(|error| format!("{BUSYBOX}: {error}"))?;
        let line = |path: &PathBuf| [path.as_os_str().as_bytes(), b"\n"].concat();
        let shown: Vec<u8> = self.shown.iter().flat_map(line).collect();
        let mut archive = Archive::default().folder("bin")?.folder("modules")?;
        for module in &self.kernel.modules {
            let name = module.file_name().unwrap_or_default().display();
            archive = archive.file(&format!("modules/{name}"), &tool::read(module)?)?;
        }
        archive
            .program("bin/busybox", &busybox)?
            .program("init", INIT)?
            .file("shown", &shown)?
            .file("writable", &line(&self.writable))?
            .file("command", &self.script)?
            .finish()
    }

    /// MiB. From 2816 on the machine has 2048 below 4G, where the kernel lies about, and the rest
    /// above in one piece.
    fn all_memory(&self) -> u32 {
        match self.gigantic {
            0 => self.memory,
            pages => (self.memory + 1024 * pages).max(2048 + 512 + 1024 * pages),
        }
    }

    fn kernel_parameters(&self) -> String {
        let plain = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off";
        match self.gigantic {
            0 => plain.to_owned(),
            pages => format!("{plain} hugepagesz=1G hugepages={pages}"),
        }
    }

    fn command(&self, folder: &Path) -> Command {
        let port = |name: &str| {
            let path = option(&folder.join(name));
            format!("socket,id={name},path={path}")
        };
        let share = |tag: &str, path: &Path, more: &str| {
            let path = option(path);
            let fs =
                format!("local,id={tag},path={path},security_model=none,multidevs=remap{more}");
            [
                "-fsdev".to_owned(),
                fs,
                "-device".to_owned(),
                format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
            ]
        };
        let mut command = tool::ends_with_us("KILL", QEMU);
        command.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-machine", "q35"]);
        command.args(["-m", &self.all_memory().to_string(), "-smp", &(self.cpus + 1).to_string()]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        command.args(["-chardev", &port("console"), "-serial", "chardev:console"]);
        for (number, name) in (1..).zip(["out", "err", "status"]) {
            let device = format!("virtserialport,nr={number},chardev={name}");
            command.args(["-chardev", &port(name), "-device", &device]);
        }
        command.args(share("root", Path::new("/"), ",readonly=on"));
        command.args(share("work", &self.writable, ""));
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(folder.join("initramfs"));
        command.args(["-append", &self.kernel_parameters()]);
        command.stdin(Stdio::null());
        command
    }
}

/// A path as a value of QEMU's options, where a comma ends a value and two are one.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// What is done with the bytes of a port.
pub(super) type Taker<'a> = &'a mut (dyn FnMut(&[u8]) + Send);

/// Passes on what comes by a port until it is closed.
fn stream(listener: &UnixListener, take: Taker<'_>) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        take(&bytes[..count]);
    }
}

/// Waits for QEMU's end, and brings it about where it has to be.
fn watch(
    qemu: &mut Child,
    seconds: u32,
    patience: Option<&str>,
    interrupted: &AtomicBool,
) -> Result<End, String> {
    let mut looks = 0;
    loop {
        let ended = qemu.try_wait().map_err(|error| format!("{QEMU}: {error}"))?.is_some();
        let end = match (interrupted.load(Ordering::Relaxed), ended) {
            // A terminal's Ctrl-C reaches QEMU as well.
            (true, _) => End::Interrupted,
            (false, true) => return Ok(End::Itself),
            (false, false) if looks >= seconds * LOOKS_A_SECOND => End::Time,
            (false, false) => {
                looks += 1;
                if let Some(whose) = patience.filter(|_| looks % (TOLD * LOOKS_A_SECOND) == 0) {
                    eprintln!("lab: {whose}: {} s", looks / LOOKS_A_SECOND);
                }
                std::thread::sleep(LOOK);
                continue;
            }
        };
        // It may have ended between the look and now.
        let _ = qemu.kill();
        let _ = qemu.wait();
        return Ok(end);
    }
}

/// What a kernel's console says where something is wrong.
const COMPLAINTS: [&str; 4] = ["WARNING:", "BUG:", "Oops", "Kernel panic"];

/// The command's exit status, if all went as it should. A failure is said in the first line.
fn verdict(end: End, seconds: u32, status: &str, console: &str) -> Result<u8, String> {
    let lines: Vec<&str> = console.lines().collect();
    let complaint = |line: &&str| COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    let first = lines.iter().position(complaint);
    let from = first.unwrap_or(lines.len().saturating_sub(CONSOLE_LINES));
    let shown: Vec<&str> = lines[from..].iter().take(2 * CONSOLE_LINES).copied().collect();
    let says = if shown.is_empty() {
        String::new()
    } else {
        format!("\nits console:\n{}", shown.join("\n"))
    };
    let panic = lines.iter().find(|line| line.contains("Kernel panic"));
    match (end, panic, status.trim().parse()) {
        (End::Interrupted, _, _) => Err(tool::INTERRUPTED.to_owned()),
        (_, Some(panic), _) => {
            let why: Vec<&str> = first.map(|at| lines[at]).into_iter().chain([*panic]).collect();
            Err(format!("the kernel panicked: {}{says}", unstamped(&why)))
        }
        (_, None, Ok(status)) => {
            // The command's status is its own, but who tests a kernel wants to see this.
            if first.is_some() {
                eprintln!("lab: the kernel complains{says}");
            }
            Ok(status)
        }
        (End::Time, None, Err(_)) => Err(format!("no end after {seconds} s (--timeout){says}")),
        (End::Itself, None, Err(_)) => Err(format!("the kernel ended without the command{says}")),
    }
}

/// Lines of the console's in one, each once, without the times that they begin with.
fn unstamped(lines: &[&str]) -> String {
    let mut plain: Vec<&str> =
        lines.iter().map(|line| line.split_once("] ").map_or(*line, |(_, rest)| rest)).collect();
    plain.dedup();
    plain.join("; ")
}

/// A folder for the time of a run. Its path is short: a socket's may have 107 bytes.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("polder-lab-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // There is nobody to tell, and nothing to do about it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_counts_unless_the_kernel_did_not_live() {
        assert_eq!(verdict(End::Itself, 9, "3\n", ""), Ok(3));
        // It had ended already, and only the machine did not go off.
        assert_eq!(verdict(End::Time, 9, "0\n", ""), Ok(0));
        let said = |end, status, console| verdict(end, 9, status, console).unwrap_err();
        let console =
            "[    1.0] x\n[    2.0] Oops: int3\n[    2.1] y\n[    3.0] Kernel panic - z\n";
        let panicked = said(End::Itself, "0", console);
        let (why, rest) = panicked.split_once('\n').unwrap();
        assert_eq!(why, "the kernel panicked: Oops: int3; Kernel panic - z");
        assert!(rest.contains("] y\n") && !rest.contains("] x"), "{rest}");
        assert!(said(End::Itself, "", "x").contains("without the command\nits console:\nx"));
        assert!(said(End::Time, "", "").contains("no end after 9 s"));
        assert!(said(End::Interrupted, "0", "").contains("interrupted"));
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_an_option() {
        assert_eq!(option(Path::new("/a,b")), "/a,,b");
    }

    #[test]
    fn a_machine_that_does_not_end_is_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let never = AtomicBool::new(false);
        assert_eq!(watch(&mut child, 0, None, &never), Ok(End::Time));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(watch(&mut child, 60, None, &AtomicBool::new(true)), Ok(End::Interrupted));
        let mut child = Command::new("true").spawn().unwrap();
        assert_eq!(watch(&mut child, 60, None, &AtomicBool::new(false)), Ok(End::Itself));
    }
}
