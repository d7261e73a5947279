//! `cargo xtask soak`: the long forms of what CI runs for seconds.
//!
//! Each part is a command that takes a seed, or chooses by itself; it is run again and again, with
//! the next seed, until its share of the time is over. What a run writes is kept if it fails.

mod parts;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use parts::{PARTS, Part};

/// Run the checkers for long: searches, random programs, stress on real memory.
#[derive(Parser)]
#[command(
    bin_name = "cargo xtask soak",
    after_help = "\
Examples:
  cargo xtask soak                               ten minutes, shared by all parts
  cargo xtask soak --seconds 28800               a night
  cargo xtask soak --part shuttle --seconds 600  one of them
  cargo xtask soak --part list                   what there is

Exit status: 0 all passed, 1 something failed, 2 it could not be done, 130 interrupted."
)]
struct Arguments {
    /// How long in all, building left out
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// One part, or `list`
    #[arg(long, value_name = "NAME")]
    part: Option<String>,
    /// The first seed
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How long a part may take beyond what it is told to: building is not told.
const GRACE: Duration = Duration::from_secs(900);

/// How a part went.
struct Soaked {
    part: &'static Part,
    runs: u64,
    time: Duration,
    /// The seed of the run that failed, and what it wrote.
    failed: Option<(u64, PathBuf)>,
}

pub(crate) fn main(root: &Path) -> ExitCode {
    let arguments = match Arguments::try_parse_from(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    if arguments.part.as_deref() == Some("list") {
        PARTS.iter().for_each(|part| println!("{:<12} {}", part.name, part.about));
        return ExitCode::SUCCESS;
    }
    match soak(root, &arguments) {
        Ok((soaked, interrupted)) => {
            tell(&soaked, &arguments);
            let failed = soaked.iter().any(|part| part.failed.is_some());
            ExitCode::from(if failed {
                1
            } else if interrupted {
                130
            } else {
                0
            })
        }
        Err(why) => {
            eprintln!("soak: {why}");
            ExitCode::from(2)
        }
    }
}

fn soak(root: &Path, arguments: &Arguments) -> Result<(Vec<Soaked>, bool), String> {
    let named = |part: &&Part| arguments.part.as_deref().is_none_or(|name| name == part.name);
    let parts: Vec<&'static Part> = PARTS.iter().filter(named).collect();
    if parts.is_empty() {
        return Err("there is no part of this name; `--part list` names them".to_owned());
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one ends the program at once.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|error| format!("signals: {error}"))?;
    }
    let logs = root.join("target/soak");
    fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    let bar = if arguments.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(200));
    for part in &parts {
        bar.set_message(format!("building {}", part.name));
        let log = logs.join("build.log");
        let built = run(root, &part.build(), part.environment, (0, 0), &log, &interrupted)?;
        if interrupted.load(Ordering::Relaxed) {
            return Ok((Vec::new(), true));
        }
        if !built {
            return Err(format!("{} could not be built: see {}", part.name, log.display()));
        }
    }
    let share = Duration::from_secs(arguments.seconds) / u32::try_from(parts.len()).unwrap_or(1);
    let soak = |part| soak_part(root, part, (share, arguments.seed), &logs, &bar, &interrupted);
    let soaked = parts.into_iter().map(soak).collect::<Result<_, _>>();
    bar.finish_and_clear();
    Ok((soaked?, interrupted.load(Ordering::Relaxed)))
}

/// Runs a part until its share of the time is over, once at least, or a run fails.
fn soak_part(
    root: &Path,
    part: &'static Part,
    (share, first_seed): (Duration, u64),
    logs: &Path,
    bar: &ProgressBar,
    interrupted: &AtomicBool,
) -> Result<Soaked, String> {
    let start = now();
    let mut soaked = Soaked { part, runs: 0, time: Duration::ZERO, failed: None };
    while !interrupted.load(Ordering::Relaxed) && soaked.failed.is_none() {
        let left = share.saturating_sub(start.elapsed());
        if soaked.runs > 0 && left.is_zero() {
            break;
        }
        let seed = first_seed.wrapping_add(soaked.runs);
        bar.set_message(format!("{}: run {}, seed {seed}", part.name, soaked.runs + 1));
        let log = logs.join(format!("{}.log", part.name));
        let numbers = (seed, left.as_secs().max(1));
        let passed = run(root, part.run, part.environment, numbers, &log, interrupted)?;
        if !passed && !interrupted.load(Ordering::Relaxed) {
            soaked.failed = Some((seed, log));
        }
        soaked.runs += 1;
    }
    soaked.time = start.elapsed();
    Ok(soaked)
}

#[expect(clippy::disallowed_methods, reason = "how long to soak is not part of a run's result")]
fn now() -> Instant {
    Instant::now()
}

/// Runs cargo; whether it said that all is well. It has a while more than it is told to take, and
/// is ended then: what hangs has failed.
fn run(
    root: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
    (seed, seconds): (u64, u64),
    log: &Path,
    interrupted: &AtomicBool,
) -> Result<bool, String> {
    let filled = |word: &str| match word {
        "SEED" => seed.to_string(),
        "SECONDS" => seconds.to_string(),
        other => other.to_owned(),
    };
    let file = File::create(log).map_err(|error| format!("{}: {error}", log.display()))?;
    let also = file.try_clone().map_err(|error| format!("{}: {error}", log.display()))?;
    let child = Command::new(env!("CARGO"))
        .args(arguments.iter().map(|word| filled(word)))
        .envs(environment.iter().map(|(name, value)| (name, filled(value))))
        .current_dir(root)
        .stdin(std::process::Stdio::null())
        .stdout(file)
        .stderr(also)
        // So that all that it starts can be ended.
        .process_group(0)
        .spawn();
    let mut child = child.map_err(|error| format!("cargo: {error}"))?;
    let start = now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.success()),
            Ok(None) => {}
            Err(error) => return Err(format!("cargo: {error}")),
        }
        let hangs = start.elapsed() > Duration::from_secs(seconds).saturating_add(GRACE);
        if hangs || interrupted.load(Ordering::Relaxed) {
            end(&mut child);
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Ends a child and all of its group.
fn end(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    for signal in [Signal::TERM, Signal::KILL] {
        let _ = group.map(|group| kill_process_group(group, signal));
        for _ in 0..20 {
            if !matches!(child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let _ = child.wait();
}

fn tell(soaked: &[Soaked], arguments: &Arguments) {
    if arguments.json {
        let parts: Vec<Value> = soaked.iter().map(to_json).collect();
        let failed = soaked.iter().filter(|part| part.failed.is_some()).count();
        println!("{}", json!({ "parts": parts, "failed": failed }));
        return;
    }
    for Soaked { part, runs, time, failed } in soaked {
        let soaked_runs = *runs;
        let runs = format!("{runs} {}", if *runs == 1 { "run" } else { "runs" });
        let end = match failed {
            None if soaked_runs == 0 => "not run".to_owned(),
            None => "passed".to_owned(),
            Some((seed, log)) if part.takes_a_seed() => {
                format!("FAILED with seed {seed}: see {}", log.display())
            }
            Some((_, log)) => format!("FAILED: see {}", log.display()),
        };
        println!("{:<12} {runs:>10} in {:>6.1} s  {end}", part.name, time.as_secs_f64());
    }
}

fn to_json(soaked: &Soaked) -> Value {
    let Soaked { part, runs, time, failed } = soaked;
    json!({
        "name": part.name,
        "runs": runs,
        "seconds": time.as_secs_f64(),
        "failed": failed.as_ref().map(|(seed, log)| json!({ "seed": seed, "log": log })),
    })
}
