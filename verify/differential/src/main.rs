//! `cargo xtask differential`: plays random programs on hosts that have to agree.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use polder::HostKind;
use polder_differential::{Came, Difference, Side, compare, program, save, shrink, side_by_side};
use serde_json::{Value, json};

/// Play random programs about memory on two hosts, and hold what comes of them against each other.
///
/// What differs is made as small as it goes, shown side by side, and saved as a scenario that
/// `polder play` replays. A seed decides a program: the same seed is the same program.
#[derive(Parser)]
#[command(
    name = "cargo xtask differential",
    after_help = "\
Examples:
  cargo xtask differential                        1000 programs, machine and memfd
  cargo xtask differential --seconds 600 --seed 1000000
  cargo xtask differential --seed 4711 --programs 1
  cargo xtask lab -- target/release/polder-differential \
      --hosts machine,guest_memfd --save target/lab/work
  polder play target/differential/machine-memfd-4711.toml --host memfd

Exit status: 0 all agree, 1 something differs, 2 a host can't be used here, 130 interrupted."
)]
struct Arguments {
    /// The hosts, two or more: the first is what the others are held against
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_value = "machine,memfd")]
    hosts: Vec<HostKind>,
    /// Stop after so many seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Stop after so many programs; 1000, unless seconds are given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    programs: Option<u64>,
    /// The seed of the first program; the next has the next
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where to save what differs; target/differential, unless said
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// After so many differences there is enough to look at.
const ENOUGH: usize = 10;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.hosts.len() < 2 {
        return trouble(&arguments, "one host is held against another: name two or more");
    }
    let others = &arguments.hosts[1..];
    if others.contains(&arguments.hosts[0]) {
        return trouble(&arguments, "a host always agrees with itself: name two that differ");
    }
    let mut run = match Run::new(&arguments) {
        Ok(run) => run,
        Err(error) => return trouble(&arguments, &format!("signals: {error}")),
    };
    if let Err(why) = run.all() {
        run.bar.finish_and_clear();
        return trouble(&arguments, &why);
    }
    run.tell()
}

fn trouble(arguments: &Arguments, why: &str) -> ExitCode {
    if arguments.json {
        print(&format!("{}\n", json!({ "error": { "what": why } })));
    } else {
        note(&format!("error: {why}"));
    }
    ExitCode::from(2)
}

/// Nobody may be reading any more, and that is all right.
fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Something that was found.
struct Found {
    seed: u64,
    sides: [Side; 2],
    difference: Difference,
    file: Result<PathBuf, String>,
}

struct Run<'a> {
    arguments: &'a Arguments,
    start: Instant,
    interrupted: Arc<AtomicBool>,
    bar: ProgressBar,
    programs: u64,
    steps: u64,
    /// How often each word came.
    words: BTreeMap<&'static str, u64>,
    found: Vec<Found>,
}

impl<'a> Run<'a> {
    fn new(arguments: &'a Arguments) -> std::io::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // The second one ends the program at once.
            let again = Arc::clone(&interrupted);
            signal_hook::flag::register_conditional_shutdown(signal, 130, again)?;
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        // On standard error, and only where that is a terminal.
        let bar = match (arguments.json, limit(arguments)) {
            (true, _) => ProgressBar::hidden(),
            (false, Some(programs)) => ProgressBar::new(programs),
            (false, None) => ProgressBar::new_spinner(),
        };
        let template = match limit(arguments) {
            Some(_) => "{bar:30} {pos}/{len} {elapsed} {msg}",
            None => "{spinner} {elapsed} {msg}",
        };
        let style = ProgressStyle::with_template(template);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self {
            arguments,
            start: now(),
            interrupted,
            bar,
            programs: 0,
            steps: 0,
            words: BTreeMap::new(),
            found: Vec::new(),
        })
    }

    fn is_over(&self) -> bool {
        let seconds = self.arguments.seconds.map(Duration::from_secs);
        self.interrupted.load(Ordering::Relaxed)
            || self.found.len() >= ENOUGH
            || limit(self.arguments).is_some_and(|programs| self.programs >= programs)
            || seconds.is_some_and(|seconds| self.start.elapsed() >= seconds)
    }

    /// Plays program after program.
    ///
    /// # Errors
    /// A host can't be used here.
    fn all(&mut self) -> Result<(), String> {
        let hosts = &self.arguments.hosts;
        while !self.is_over() {
            let seed = self.arguments.seed.wrapping_add(self.programs);
            let program = program(seed, hosts);
            for other in &hosts[1..] {
                let sides = [Side::new(hosts[0]), Side::new(*other)];
                match compare(&program, &sides) {
                    Came::Agreed(played) => {
                        self.steps += played.steps.len() as u64;
                        for step in &played.steps {
                            *self.words.entry(step.outcome.is.name()).or_default() += 1;
                        }
                    }
                    Came::Skipped(host, why) => {
                        return Err(format!("host {host} can't be used here: {why}"));
                    }
                    Came::Differs(difference) => self.add(seed, sides, *difference),
                }
            }
            self.programs += 1;
            let (steps, found) = (self.steps, self.found.len());
            self.bar.set_message(format!("{steps} steps agree, {found} programs differ"));
            self.bar.set_position(self.programs);
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    fn add(&mut self, seed: u64, sides: [Side; 2], difference: Difference) {
        self.bar.set_message(format!("the program of seed {seed} differs; it is made smaller"));
        let interrupted = Arc::clone(&self.interrupted);
        let difference = shrink(difference, &sides, || !interrupted.load(Ordering::Relaxed));
        let file = save(&difference, &sides, seed, &self.folder());
        if !self.arguments.json {
            let mut text = format!("\nthe program of seed {seed} differs\n");
            text += &side_by_side(&difference, &sides, seed);
            let _ = match &file {
                Ok(file) => writeln!(text, "saved: polder play {}", file.display()),
                Err(why) => writeln!(text, "it can't be saved: {why}"),
            };
            self.bar.suspend(|| print(&text));
        }
        self.found.push(Found { seed, sides, difference, file });
    }

    fn folder(&self) -> PathBuf {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target"),
            PathBuf::from,
        );
        self.arguments.save.clone().unwrap_or_else(|| target.join("differential"))
    }

    /// Tells what came of it all.
    fn tell(&self) -> ExitCode {
        let seconds = self.start.elapsed().as_secs_f64();
        let interrupted = self.interrupted.load(Ordering::Relaxed);
        if self.arguments.json {
            print(&format!("{}\n", self.to_json(seconds, interrupted)));
        } else {
            print(&self.to_text(seconds, interrupted));
        }
        match (self.found.is_empty(), interrupted) {
            (false, _) => ExitCode::FAILURE,
            (true, true) => ExitCode::from(130),
            (true, false) => ExitCode::SUCCESS,
        }
    }

    fn to_text(&self, seconds: f64, interrupted: bool) -> String {
        let hosts: Vec<String> = self.arguments.hosts.iter().map(ToString::to_string).collect();
        let words: Vec<String> = {
            let mut words: Vec<_> = self.words.iter().collect();
            words.sort_by_key(|(name, count)| (u64::MAX - **count, **name));
            words.into_iter().map(|(name, count)| format!("{count} {name}")).collect()
        };
        let mut text = String::new();
        let _ = writeln!(text, "what came of the steps: {}", words.join(", "));
        let _ = writeln!(
            text,
            "{}{} programs from seed {}, {} steps alike on {}, {} differ, {seconds:.1} s",
            if interrupted { "interrupted: " } else { "" },
            self.programs,
            self.arguments.seed,
            self.steps,
            hosts.join(" and "),
            self.found.len(),
        );
        text
    }

    fn to_json(&self, seconds: f64, interrupted: bool) -> Value {
        let step = |found: &Found, at: usize| {
            let [one, other] = &found.difference.played;
            let came =
                |played: &polder_play::Played| played.steps.get(at).map(|step| step.outcome.line());
            let step = &one.steps[at];
            json!({
                "actor": step.actor,
                "did": step.did,
                "outcomes": [came(one), came(other)],
                "differs": found.difference.step == Some(at),
            })
        };
        let found = |found: &Found| {
            let steps = 0..found.difference.played[0].steps.len();
            json!({
                "seed": found.seed,
                "hosts": found.sides.map(|side| side.host.to_string()),
                "what": found.difference.what,
                "file": found.file.as_ref().ok().map(|file| file.display().to_string()),
                "steps": steps.map(|at| step(found, at)).collect::<Vec<_>>(),
            })
        };
        let hosts: Vec<String> = self.arguments.hosts.iter().map(ToString::to_string).collect();
        json!({
            "hosts": hosts,
            "seed": self.arguments.seed,
            "programs": self.programs,
            "steps": self.steps,
            "outcomes": self.words,
            "seconds": seconds,
            "interrupted": interrupted,
            "differences": self.found.iter().map(found).collect::<Vec<_>>(),
        })
    }
}

/// How many programs, if that is said.
fn limit(arguments: &Arguments) -> Option<u64> {
    arguments.programs.or(arguments.seconds.is_none().then_some(1000))
}

#[expect(clippy::disallowed_methods, reason = "the one place of the program that reads the clock")]
fn now() -> Instant {
    Instant::now()
}
