//! `polder explain` and the control socket of a run, asked by friend and foe.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A folder for the control sockets of one test.
struct Runtime(PathBuf);

impl Runtime {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&path);
        DirBuilder::new().mode(0o700).create(&path).expect("a folder for the test");
        Self(path)
    }

    fn polder(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
        command.args(arguments.split_whitespace()).env("XDG_RUNTIME_DIR", &self.0);
        command
    }

    fn output(&self, arguments: &str) -> Output {
        self.polder(arguments).output().expect("the program starts")
    }

    fn json(&self, arguments: &str) -> Value {
        let output = self.output(arguments);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.join("polder")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// A guest that never ends, on the simulated machine, once it can be asked.
    fn spin(&self, seconds: u64) -> Run {
        let arguments = format!("run --host machine --guest spin --json --timeout {seconds}");
        let child = self.polder(&arguments).stdout(Stdio::piped()).spawn().expect("it starts");
        let socket = self.0.join(format!("polder/{}.sock", child.id()));
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Run { child: Some(child), socket }
    }
}

/// A run, which ends with the test.
struct Run {
    child: Option<Child>,
    socket: PathBuf,
}

impl Run {
    fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
        stream
    }

    fn interrupt(&self) {
        let kill = Command::new("kill").args(["-INT", &self.pid().to_string()]).status();
        assert!(kill.expect("kill").success());
    }

    /// How it ended, by itself.
    fn end(mut self) -> (Option<i32>, Value) {
        let output = self.child.take().expect("it runs").wait_with_output().expect("it ends");
        let report = serde_json::from_slice(&output.stdout).expect("a report");
        (output.status.code(), report)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_page_of_a_running_guest_is_explained() {
    let runtime = Runtime::new("explain-page");
    let run = runtime.spin(60);
    let object = runtime.json("explain gpa:0x1000 --json");
    let page = &object["explanation"];
    assert_eq!((&page["granted"], &page["population"]), (&"private".into(), &"whole".into()));
    assert_eq!(page["bindings"][0]["gpa"], 0x1000, "{page}");
    assert_eq!(page["host"]["name"], "machine");
    let number = page["page"].as_u64().expect("a number");
    let same = runtime.json(&format!("explain {number:#x} --json --pid {}", run.pid()));
    assert_eq!(same["explanation"]["page"], number);

    let text = runtime.output(&format!("explain {number}"));
    let text = String::from_utf8(text.stdout).expect("text");
    for line in [
        "host access refused: it is private to the guest",
        "wants private",
        "4K at most (view: the view maps no larger pages)",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn what_can_t_be_explained_is_refused_with_the_way_out() {
    let runtime = Runtime::new("explain-refused");
    let refused = |arguments: &str| {
        let output = runtime.output(&format!("explain {arguments} --json"));
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        let object: Value = serde_json::from_slice(&output.stdout).expect("an error");
        object["error"].clone()
    };
    let none = refused("1");
    assert_eq!(none["what"], "there is no `polder run` to ask");
    assert!(none["try"].as_str().is_some_and(|text| text.contains("polder run --guest spin")));
    let one = runtime.spin(60);
    let beyond = refused("99999999");
    assert!(beyond["what"].as_str().is_some_and(|what| what.contains("beyond")), "{beyond}");
    assert!(beyond["try"].as_str().is_some_and(|out| out.contains("from 0 to 0x")), "{beyond}");
    let nowhere = refused("gpa:0xfffffffffffff000");
    assert!(nowhere["try"].as_str().is_some_and(|out| out.contains("(slot 0)")), "{nowhere}");
    let _other = runtime.spin(60);
    assert!(refused("1")["what"].as_str().is_some_and(|what| what.contains("several runs")));
    let own = std::process::id();
    let other = refused(&format!("1 --pid {own}"));
    let runs = other["try"].as_str().expect("a way out");
    assert!(runs.contains(&one.pid().to_string()), "{other}");
    assert!(runtime.output(&format!("explain 1 --pid {}", one.pid())).status.success());
    for bad in ["", "x", "-1", "gpa:", "0x", "99999999999999999999", "0xffffffffffffffff"] {
        let output = runtime.output(&format!("explain {bad}"));
        assert_eq!(output.status.code(), Some(2), "{bad}");
    }
}

#[test]
fn the_socket_is_the_users_alone_and_gone_when_the_run_is() {
    let runtime = Runtime::new("explain-socket");
    for interrupt in [false, true] {
        let run = runtime.spin(if interrupt { 60 } else { 1 });
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode();
        assert_eq!(mode(&run.socket) & 0o777, 0o600);
        assert_eq!(mode(&runtime.0.join("polder")) & 0o777, 0o700);
        if interrupt {
            run.interrupt();
        }
        let (status, report) = run.end();
        let ended = if interrupt { (130, "interrupted") } else { (1, "timeout") };
        assert_eq!((status, &report["guest"]["exit"]), (Some(ended.0), &ended.1.into()));
        assert_eq!(runtime.sockets(), [] as [PathBuf; 0]);
    }
    // Of a run that ended by force: whoever asks next takes it away.
    let mut run = runtime.spin(60);
    let mut child = run.child.take().expect("it runs");
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    assert_eq!(runtime.sockets().len(), 1);
    assert_eq!(runtime.output("explain 1").status.code(), Some(2));
    assert_eq!(runtime.sockets(), [] as [PathBuf; 0]);
}

#[test]
fn a_folder_that_others_can_change_is_not_used_and_the_run_goes_on() {
    let runtime = Runtime::new("explain-folder");
    let folder = runtime.0.join("polder");
    for make in [
        |folder: &Path| {
            fs::create_dir(folder).expect("a folder");
            fs::set_permissions(folder, Permissions::from_mode(0o777)).expect("its mode");
        },
        |folder: &Path| std::os::unix::fs::symlink("/tmp", folder).expect("a link"),
        |folder: &Path| fs::write(folder, "no folder").expect("a file"),
    ] {
        make(&folder);
        let output = runtime.output("run --host machine --guest triple-fault");
        let note = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{note}");
        assert!(note.contains("`polder explain` can't reach this run"), "{note}");
        assert_eq!(runtime.output("explain 1").status.code(), Some(2));
        let _ = fs::remove_dir(&folder).or_else(|_| fs::remove_file(&folder));
    }
}

/// Half questions, floods, readers that don't read, questions without end, and no question at all.
#[test]
fn hostile_peers_neither_stop_the_run_nor_keep_others_out() {
    let runtime = Runtime::new("explain-hostile");
    let run = runtime.spin(12);
    let mut silent: Vec<UnixStream> = (0..40).map(|_| run.connect()).collect();
    for (number, stream) in (0..).zip(&mut silent) {
        let bytes: &[u8] = match number % 5 {
            0 => b"explain pa",
            1 => b"\xff\xfe\0\0\n\n\n",
            2 => b"explain page 99999999999999999999999999\n",
            3 => &[b'x'; 4096],
            _ => b"",
        };
        // It may have been turned away by now.
        let _ = stream.write_all(bytes);
    }
    // One that asks and does not read; the answer waits for it no longer than its time.
    let mut deaf = run.connect();
    let _ = deaf.write_all(b"explain page 1\n");
    let flood = std::thread::spawn({
        let socket = run.socket.clone();
        move || (0..500).filter_map(|_| UnixStream::connect(&socket).ok()).count()
    });
    for _ in 0..3 {
        let output = runtime.output("explain 1 --json");
        assert!(output.status.success(), "{output:?}");
    }
    assert!(flood.join().expect("no panic") > 0);
    let mut told = Vec::new();
    let mut wrong = run.connect();
    // It may be turned away, too, and is told so by an end without a word.
    if wrong.write_all(b"explain everything\n").is_ok() && wrong.read_to_end(&mut told).is_ok() {
        let text = String::from_utf8_lossy(&told);
        assert!(text.is_empty() || text.contains("no question"), "{text}");
    }
    drop(silent);
    let (status, report) = run.end();
    assert_eq!((status, &report["guest"]["exit"]), (Some(1), &"timeout".into()), "{report}");
    let seconds = report["seconds"].as_f64().expect("a number");
    assert!(seconds < 20.0, "it took {seconds} s of 12");
}
