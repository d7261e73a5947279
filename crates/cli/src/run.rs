//! `polder run`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use polder::units::{ByteSize, GfnRange, PageCount};
use polder::{HostKind, PageSize, Platform};
use polder_vmm::guest::Program;
use polder_vmm::{Config, Prefault, Progress, Supervision};

use crate::control::Control;
use crate::picture::rounded;
use crate::run_from::{From, Run};
use crate::run_report::{status, to_json, to_text};
use crate::trouble::Trouble;
use crate::{doctor, interrupt, output};

/// Run a guest on Polder's memory, and check every byte of it.
///
/// The guest fills private memory, shares and unshares pages of it in many patterns, and talks to
/// a device through shared pages, verifying everything after every step. Meanwhile the host tries
/// to reach the private pages, and has to be denied each time.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder run                              64M, 2 vCPUs
  polder run --memory 8G --vcpus 4        larger
  polder run --page-size 2m               in huge pages, reserved before it starts
  polder run --json | jq .guest           for programs
  polder run --guest spin --timeout 2     a guest that never ends
  polder run --platform pkvm              a protected VM, on the simulated machine
  polder run --from snapshot.mem          memory filled from a file while the guest runs
  polder run --memory 1G --prefault all   memory mapped before the guest touches it
  polder run --prefault 16M+32M           a part of it, by guest-physical address

Exit status: 0 every check passed, 1 one failed or the guest did not end, 2 it could not be run,
130 interrupted.")]
pub(crate) struct Arguments {
    /// Where the memory lives
    #[arg(long, value_enum, default_value_t = Host::Auto)]
    host: Host,
    /// The kind of VM; all but plain on the simulated machine only
    #[arg(long, value_enum, default_value_t = Kind::Plain)]
    pub(crate) platform: Kind,
    /// The guest's memory, 16M to 1T; 64M by default
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    pub(crate) memory: Option<ByteSize>,
    /// The guest's vCPUs, 1 to 4
    #[arg(long, value_name = "N", default_value_t = 2, allow_negative_numbers = true)]
    pub(crate) vcpus: u32,
    /// The size of the pages that back the memory
    ///
    /// 4k; thp: transparent huge pages, where the kernel has some to give; 2m or 1g: huge pages
    /// that are reserved for the guest before it starts
    #[arg(long, value_name = "SIZE", default_value = "4k")]
    pub(crate) page_size: PageSize,
    /// Decides the guest's patterns and ranges: the same seed gives the same ones
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub(crate) seed: u64,
    /// Stop the guest after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, allow_negative_numbers = true)]
    pub(crate) timeout: u64,
    /// Delay each stage of every operation by a random time up to this one, to shake out races
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    delays: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Map memory ahead of the guest: all of it, none, or a range of guest-physical addresses as
    /// START+SIZE, such as 16M+32M or 0x1000000+32M
    #[arg(long, value_name = "all|RANGE|none", default_value = "none", value_parser = ahead)]
    prefault: Ahead,
    /// Map ahead before the guest starts, or beside it while it runs
    #[arg(long, value_enum, default_value_t = When::Start, value_name = "WHEN")]
    prefault_when: When,
    /// For guests that must not wait: map, lock and check all memory before the start, or say what
    /// stands in the way
    #[arg(long, conflicts_with = "prefault_when")]
    no_faults_after_start: bool,
    /// What the guest does; all but the first misbehave, to show how that ends
    #[arg(long, value_enum, default_value_t = Guest::SelfTest)]
    pub(crate) guest: Guest,
    #[command(flatten)]
    from: From,
}

/// The guest's memory unless said.
pub(crate) const MEMORY: ByteSize = ByteSize::new(64 << 20);

#[derive(Clone, Copy, ValueEnum)]
enum Host {
    /// memfd where KVM and userfaultfd can be used, else machine
    Auto,
    /// A memfd on KVM, private pages guarded by userfaultfd
    Memfd,
    /// The kernel's guest_memfd: private pages are the guest's alone; needs a KVM with TDP
    #[value(name = "guest_memfd")]
    GuestMemfd,
    /// The simulated machine: needs nothing
    Machine,
}

/// Kinds of VM.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// An ordinary VM: the VMM decides what is private
    Plain,
    /// KVM's software-protected type
    SwProtected,
    /// SEV-SNP: an RMP has the last word
    Snp,
    /// A protected VM under pKVM: the guest alone shares its pages
    Pkvm,
}

impl Kind {
    pub(crate) fn platform(self) -> Platform {
        match self {
            Self::Plain => Platform::Plain,
            Self::SwProtected => Platform::SwProtected,
            Self::Snp => Platform::Snp,
            Self::Pkvm => Platform::Pkvm,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Guest {
    /// Converts and checks its memory
    SelfTest,
    /// Ends in a triple fault at once
    TripleFault,
    /// Loops for ever
    Spin,
    /// Makes senseless requests for ever
    Flood,
}

/// What is mapped ahead.
#[derive(Clone, Copy, Debug)]
enum Ahead {
    None,
    All,
    Range(GfnRange),
}

#[derive(Clone, Copy, ValueEnum)]
enum When {
    /// Before the guest starts
    Start,
    /// While it runs
    Running,
}

fn ahead(text: &str) -> Result<Ahead, String> {
    match text {
        "none" => return Ok(Ahead::None),
        "all" => return Ok(Ahead::All),
        _ => {}
    }
    let form = "expected all, none, or START+SIZE, such as 16M+32M or 0x1000000+32M";
    let (start, size) = text.split_once('+').ok_or(form)?;
    let start = match start.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).map_err(|_| form)?,
        None => start.parse::<ByteSize>().map_err(|error| error.to_string())?.get(),
    };
    let size: ByteSize = size.parse().map_err(|_| form)?;
    let gfns = GfnRange::from_bytes(start, size.get()).map_err(|error| error.to_string())?;
    Ok(Ahead::Range(gfns))
}

/// The host to run on, and why it is not the one that is tried first.
fn choose(host: Host, kind: Kind) -> (HostKind, Option<Trouble>) {
    match host {
        // What no machine here has is simulated: that is what was asked for.
        Host::Auto if kind != Kind::Plain => (HostKind::Machine, None),
        Host::Memfd => (HostKind::Memfd, None),
        Host::GuestMemfd => (HostKind::GuestMemfd, None),
        Host::Machine => (HostKind::Machine, None),
        Host::Auto => match polder_vmm::check_kvm(HostKind::Memfd) {
            Ok(_) => (HostKind::Memfd, None),
            Err(error) => (HostKind::Machine, Some(Trouble::new(&error, error.way_out()))),
        },
    }
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let (host, instead) = choose(arguments.host, arguments.platform);
    if let Some(instead) = instead.as_ref().filter(|_| !arguments.json) {
        instead.note("note: this runs on the simulated machine");
    }
    if let Some(path) = arguments.from.file() {
        let run = Run {
            host,
            instead: instead.as_ref(),
            memory: arguments.memory,
            page_size: arguments.page_size,
            vcpus: arguments.vcpus,
            seed: arguments.seed,
            timeout: arguments.timeout,
            json: arguments.json,
        };
        return arguments.from.main(path, &run);
    }
    if let Some(trouble) = too_much(arguments, host) {
        return trouble.print(arguments.json);
    }
    let mut supervisor = match Supervisor::new(arguments.timeout, arguments.json) {
        Ok(supervisor) => supervisor,
        Err(error) => return Trouble::new(&error, None).print(arguments.json),
    };
    let report = polder_vmm::run(&config(arguments, host), |progress| supervisor.look(progress));
    let seconds = supervisor.finish();
    match report {
        Ok(report) => {
            if arguments.json {
                let object = to_json(arguments, (host, instead.as_ref()), &report, seconds);
                output::print(&format!("{object}\n"), status(report.end))
            } else {
                output::print(&to_text(arguments, host, &report, seconds), status(report.end))
            }
        }
        Err(error) => Trouble::new(&error, error.way_out()).print(arguments.json),
    }
}

/// What was asked for, on the host that it is run on.
fn config(arguments: &Arguments, host: HostKind) -> Config {
    let running = matches!(arguments.prefault_when, When::Running);
    Config {
        host,
        platform: arguments.platform.platform(),
        memory: arguments.memory.unwrap_or(MEMORY),
        page_size: arguments.page_size,
        vcpus: arguments.vcpus,
        seed: arguments.seed,
        program: match arguments.guest {
            Guest::SelfTest => Program::SelfTest,
            Guest::TripleFault => Program::TripleFault,
            Guest::Spin => Program::Spin,
            Guest::Flood => Program::Flood,
        },
        delays: arguments.delays.map(|micros| Duration::from_micros(micros.into())),
        prefault: match arguments.prefault {
            Ahead::None => None,
            Ahead::All => Some(Prefault { gfns: None, running }),
            Ahead::Range(gfns) => Some(Prefault { gfns: Some(gfns), running }),
        },
        no_faults: arguments.no_faults_after_start,
    }
}

/// What keeps memory from being mapped ahead: there is less of it. Else the kernel would end some
/// process, and not this one perhaps. Huge pages are reserved before, or refused.
fn too_much(arguments: &Arguments, host: HostKind) -> Option<Trouble> {
    let memory = arguments.memory.unwrap_or(MEMORY).get();
    let ahead = match arguments.prefault {
        Ahead::None if !arguments.no_faults_after_start => return None,
        Ahead::Range(gfns) if !arguments.no_faults_after_start => gfns.count().bytes()?,
        Ahead::None | Ahead::All | Ahead::Range(_) => memory,
    };
    let is_reserved = matches!(arguments.page_size, PageSize::Huge2M | PageSize::Huge1G);
    let is_paid_for = host == HostKind::Machine || is_reserved;
    let there = doctor::memory_available()?;
    (!is_paid_for && ahead > there).then(|| {
        Trouble::told(
            format!("{} of memory can't be mapped ahead", rounded(ahead)),
            Some(format!("this machine has {} available", rounded(there))),
            "ask for less memory, or map a part of it ahead: --prefault START+SIZE".into(),
        )
    })
}

/// Watches the clock and Ctrl-C, and shows the progress line.
pub(crate) struct Supervisor {
    start: Instant,
    timeout: Duration,
    line: ProgressBar,
    /// The pages to bring, where memory is filled from a file.
    pages: Option<PageCount>,
    running: ProgressStyle,
    /// While memory is mapped ahead.
    ahead: ProgressStyle,
    control: Option<Control>,
}

impl Supervisor {
    pub(crate) fn new(timeout: u64, json: bool) -> std::io::Result<Self> {
        interrupt::hear()?;
        let control = Control::listen();
        if let (Err(why), false) = (&control, json) {
            output::note(&format!("note: `polder explain` can't reach this run: {why}"));
        }
        let control = control.ok();
        // On standard error, and only where that is a terminal.
        let line = if json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let running = ProgressStyle::with_template("{spinner} {elapsed} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let ahead = ProgressStyle::with_template("{bar:30} {percent}% mapped ahead, {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        line.set_style(running.clone());
        // KVM takes its time over a slot of a terabyte, and nobody looks meanwhile.
        line.set_message("making the VM");
        line.enable_steady_tick(Duration::from_millis(100));
        let timeout = Duration::from_secs(timeout);
        Ok(Self { start: now(), timeout, line, pages: None, running, ahead, control })
    }

    /// For memory of so many pages that is filled from a file.
    pub(crate) fn of_pages(mut self, pages: PageCount) -> Self {
        let style = ProgressStyle::with_template("{bar:30} {percent}% {elapsed} {msg}");
        self.line.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.line.set_length(pages.get());
        self.pages = Some(pages);
        self
    }

    /// Shows how far it is; says whether to go on.
    pub(crate) fn look(&mut self, progress: Progress<'_>) -> Supervision {
        if let Some(control) = &mut self.control {
            control.serve(progress.of, progress.vm, self.start.elapsed());
        }
        let memory = progress.memory;
        let source = progress.source;
        if self.pages.is_some() {
            self.line.set_position(source.demanded + source.ahead + source.zeros + source.failed);
            self.line.set_message(format!(
                "{} faults, {} pages ahead",
                memory.guest_faults, source.ahead
            ));
            return self.say();
        }
        if let Some(ahead) = progress.ahead {
            self.line.set_style(self.ahead.clone());
            self.line.set_length(ahead.of);
            self.line.set_position(ahead.done);
        } else if progress.exits == 0 {
            self.line.set_style(self.running.clone());
        }
        self.line.set_message(format!(
            "{} exits, {} conversions, {} refused, {} touches denied",
            progress.exits,
            memory.to_private + memory.to_shared,
            memory.refused,
            memory.denied,
        ));
        self.say()
    }

    fn say(&self) -> Supervision {
        self.line.tick();
        if interrupt::asked() {
            self.line.set_message("interrupted: ending the VM");
            Supervision::Interrupt
        } else if self.start.elapsed() >= self.timeout {
            Supervision::TimeOut
        } else {
            Supervision::GoOn
        }
    }

    /// Takes the line away; returns how long it all took, in seconds.
    pub(crate) fn finish(self) -> f64 {
        self.line.finish_and_clear();
        self.start.elapsed().as_secs_f64()
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place of the program that reads the clock")]
fn now() -> Instant {
    Instant::now()
}
