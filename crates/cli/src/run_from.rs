//! `polder run --from`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use polder::source::{Fault, FaultySource, FileSource, Source, SourceFailure};
use polder::units::{ByteSize, PageIndex};
use polder::{HostKind, PageSize, ReadAhead};
use polder_vmm::{End, FromConfig, FromReport, OnFailedPage};
use serde_json::json;

use crate::output;
use crate::run::Supervisor;
use crate::run_report::{ended, exit, simulated, status, vcpus, verdict, why};
use crate::trouble::Trouble;

/// Memory that is filled from a file.
#[derive(Args)]
pub(crate) struct From {
    /// Fill the memory from this file while the guest runs, which reads every byte and has it
    /// checked; the memory is as large as the file
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "guest", "delays", "platform", "prefault", "prefault_when", "no_faults_after_start",
    ])]
    from: Option<PathBuf>,
    /// Make reads of the file go wrong, to see what happens
    #[arg(long, value_enum, value_name = "HOW", requires = "from")]
    from_faults: Option<FromFaults>,
    /// How many seconds the guest waits for a page, at most
    #[arg(long, value_name = "SECONDS", requires = "from", default_value_t = 10.0, value_parser = seconds)]
    deadline: f64,
    /// Read no more of the file than the guest asks for
    #[arg(long, requires = "from")]
    no_read_ahead: bool,
    /// Also bring pages that the guest has not touched yet
    #[arg(long, requires = "from")]
    fill: bool,
    /// What happens to the guest when it touches a page that did not come
    #[arg(long, value_enum, value_name = "WHAT", requires = "from", default_value_t = OnFailed::Stop)]
    on_failed_page: OnFailed,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum OnFailed {
    /// It is stopped, and the page named
    Stop,
    /// It takes a machine check that names the page, gives up what it was doing, and goes on
    Mce,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum FromFaults {
    /// One read in a few takes 20 ms
    Slow,
    /// A page in the middle can't be read
    Fail,
    /// The read of a page in the middle does not return in time
    Hang,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=86400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0.001 to 86400".into()),
    }
}

/// What the run's other options say.
pub(crate) struct Run<'a> {
    pub(crate) host: HostKind,
    pub(crate) instead: Option<&'a Trouble>,
    pub(crate) memory: Option<ByteSize>,
    pub(crate) page_size: PageSize,
    pub(crate) vcpus: u32,
    pub(crate) seed: u64,
    pub(crate) timeout: u64,
    pub(crate) json: bool,
}

impl From {
    /// The file, if one was given.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.from.as_deref()
    }

    pub(crate) fn main(&self, path: &Path, run: &Run<'_>) -> ExitCode {
        let config = match self.config(path, run) {
            Ok(config) => config,
            Err(trouble) => return trouble.print(run.json),
        };
        let size = ByteSize::new(config.pages.bytes().unwrap_or(u64::MAX));
        let supervisor = Supervisor::new(run.timeout, run.json);
        let mut supervisor = match supervisor {
            Ok(supervisor) => supervisor.of_pages(config.pages),
            Err(error) => return Trouble::new(&error, None).print(run.json),
        };
        let report = polder_vmm::run_from(&config, |progress| supervisor.look(progress));
        let seconds = supervisor.finish();
        match report {
            Ok(report) => {
                let why = self.why(run, &report);
                let text = if run.json {
                    format!("{}\n", to_json(path, run, size, (&report, why), seconds))
                } else {
                    to_text(path, run, size, (&report, why), seconds)
                };
                output::print(&text, status(report.end))
            }
            Err(error) => Trouble::new(&error, error.way_out()).print(run.json),
        }
    }

    /// Why it did not end well, and what to do about it.
    fn why(&self, run: &Run<'_>, report: &FromReport) -> Option<(String, String)> {
        let (why, way_out) = why(run.seed, report.end)?;
        let came = |failures: &[SourceFailure]| failures.first().map(ToString::to_string);
        Some(match (report.end, came(&report.failures)) {
            (End::Failed(_), Some(failure)) => {
                let way_out = match self.from_faults {
                    Some(_) => "leave --from-faults out: it has reads go wrong",
                    None => "mend the file or what it is on",
                };
                let mce = "--on-failed-page mce has the guest told, and go on";
                (failure, format!("{way_out}; or {mce}"))
            }
            _ => (why.to_owned(), way_out),
        })
    }

    fn config(&self, path: &Path, run: &Run<'_>) -> Result<FromConfig, Trouble> {
        let trouble =
            |error: polder::source::OpenError| Trouble::new(&error, Some(&error.way_out()));
        let file = FileSource::open(path).map_err(trouble)?;
        if let Some(memory) = run.memory {
            file.check_size(memory).map_err(trouble)?;
        }
        let pages = file.pages();
        let middle = PageIndex::new(pages.get() / 2).unwrap_or(PageIndex::from(0));
        let deadline = Duration::from_secs_f64(self.deadline);
        let hang = deadline + Duration::from_secs(1);
        let source: Arc<dyn Source> = match self.from_faults {
            None => Arc::new(file),
            Some(FromFaults::Slow) => {
                let slow = Fault::Slow(Duration::from_millis(20));
                Arc::new(FaultySource::new(file, slow, PageIndex::from(0), 256))
            }
            Some(FromFaults::Fail) => Arc::new(FaultySource::new(file, Fault::Fails, middle, 0)),
            Some(FromFaults::Hang) => {
                Arc::new(FaultySource::new(file, Fault::Slow(hang), middle, 0))
            }
        };
        Ok(FromConfig {
            host: run.host,
            source,
            file: path.to_owned(),
            pages,
            page_size: run.page_size,
            vcpus: run.vcpus,
            seed: run.seed,
            read_ahead: if self.no_read_ahead { ReadAhead::Off } else { ReadAhead::Adaptive },
            deadline,
            fill: self.fill,
            on_failed_page: match self.on_failed_page {
                OnFailed::Stop => OnFailedPage::Stop,
                OnFailed::Mce => OnFailedPage::MachineCheck,
            },
        })
    }
}

fn to_json(
    path: &Path,
    run: &Run<'_>,
    size: ByteSize,
    (report, why): (&FromReport, Option<(String, String)>),
    seconds: f64,
) -> serde_json::Value {
    let source = report.source;
    let failures = report.failures.iter().map(|failure| {
        json!({
            "first_page": failure.pages.start().get(),
            "pages": failure.pages.count().get(),
            "why": failure.why.to_string(),
        })
    });
    let machine_checks = report.machine_checks.iter().map(|it| {
        json!({
            "vcpu": it.vcpu,
            "page": it.page.get(),
            "gpa": it.gpa.get(),
            "taken": it.taken,
        })
    });
    json!({
        "host": run.host.to_string(),
        "accelerator": report.accelerator.to_string(),
        "vcpus": run.vcpus,
        "memory_bytes": size.get(),
        "page_size": report.page_size.to_string(),
        "guest": {
            "exit": exit(report.end),
            "checks_passed": report.checks_passed,
            "machine_checks": machine_checks.collect::<Vec<_>>(),
            "what": why.as_ref().map(|_| ended(run.timeout, report.end)),
            "why": why.as_ref().map(|(why, _)| why),
            "try": why.as_ref().map(|(_, way_out)| way_out),
        },
        "from": {
            "file": path.display().to_string(),
            "pages": {
                "demanded": source.demanded,
                "ahead": source.ahead,
                "zeros": source.zeros,
                "failed": source.failed,
                "owed": report.owed.get(),
            },
            "reads": source.reads,
            "bytes": source.bytes,
            "failures": failures.collect::<Vec<_>>(),
        },
        "faults": {
            "guest": report.memory.guest_faults,
            "host": report.memory.host_faults,
            "denied": report.memory.denied,
        },
        "simulated_because": run.instead,
        "seconds": seconds,
    })
}

fn to_text(
    path: &Path,
    run: &Run<'_>,
    size: ByteSize,
    (report, why): (&FromReport, Option<(String, String)>),
    seconds: f64,
) -> String {
    let source = report.source;
    let why = why.map_or_else(String::new, |(why, way_out)| {
        format!("\x20 why: {why}\n\x20 try: {way_out}\n")
    });
    let ended = match report.end {
        End::Ok if report.machine_checks.is_empty() => "every byte is as in the file".into(),
        End::Ok => "all that came is as in the file, and the guest was told what did not".into(),
        end => ended(run.timeout, end),
    };
    let failures: String =
        report.failures.iter().map(|failure| format!("\x20 failed       {failure}\n")).collect();
    let machine_checks: String = report
        .machine_checks
        .iter()
        .map(|it| {
            let taken = if it.taken { "taken" } else { "not taken" };
            let (vcpu, page, gpa) = (it.vcpu, it.page, it.gpa);
            format!("\x20 told         vCPU {vcpu}: machine check at {gpa}, page {page}: {taken}\n")
        })
        .collect();
    format!(
        "{verdict}: {ended}; {passed} checks passed in {seconds:.1} s\n{why}\
         \n\
         \x20 guest        {vcpus}, {size} of {page_size} pages on host {host}, \
         accelerator {accelerator}{simulated}\n\
         \x20 from         {file}\n\
         \x20 pages        {demanded} brought when asked for, {ahead} before, {zeros} zeros; \
         {failed} failed, {owed} not asked for\n\
         \x20 reads        {reads}, {bytes} bytes\n\
         \x20 faults       {guest} of the guest\n\
         {failures}{machine_checks}",
        passed = report.checks_passed,
        verdict = verdict(report.end),
        vcpus = vcpus(run.vcpus),
        simulated = simulated(report.accelerator),
        host = run.host,
        page_size = report.page_size,
        accelerator = report.accelerator,
        file = path.display(),
        demanded = source.demanded,
        ahead = source.ahead,
        zeros = source.zeros,
        failed = source.failed,
        owed = report.owed.get(),
        reads = source.reads,
        bytes = source.bytes,
        guest = report.memory.guest_faults,
    )
}
