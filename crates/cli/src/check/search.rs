//! One search after the other, in the time that there is for all of them.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use polder_explore::{How, Report, System, check};

use super::Arguments;
use crate::interrupt;

/// The time that is left.
pub(super) struct Searches {
    left: Duration,
    json: bool,
}

impl Searches {
    pub(super) fn new(arguments: &Arguments) -> Self {
        Self { left: Duration::from_secs(arguments.seconds), json: arguments.json }
    }

    pub(super) fn left(&self) -> Duration {
        self.left
    }

    /// Searches for as long as there is time. How long it took, in seconds.
    pub(super) fn run<S: System>(&mut self, name: &str, start: &S, how: How) -> (Report, f64) {
        self.run_within(self.left, name, start, how)
    }

    /// Searches for as long as `limit`, showing how far it is.
    pub(super) fn run_within<S: System>(
        &mut self,
        limit: Duration,
        name: &str,
        start: &S,
        how: How,
    ) -> (Report, f64) {
        let bar = bar(self.json, limit, name);
        let began = clock();
        let mut at_a_time = began;
        let report = check(start, how, &mut |states, _| {
            let now = clock();
            if now - at_a_time > Duration::from_millis(200) {
                at_a_time = now;
                let passed = (now - began).as_secs_f64();
                bar.set_position(((now - began).as_millis()).try_into().unwrap_or(u64::MAX));
                bar.set_message(format!("{states} states, {}/s", rate(states, passed)));
            }
            now - began < limit && !interrupt::asked()
        });
        let took = clock() - began;
        bar.finish_and_clear();
        self.left = self.left.saturating_sub(took);
        (report, took.as_secs_f64())
    }
}

#[expect(clippy::disallowed_methods, reason = "a command says how long it took")]
fn clock() -> Instant {
    Instant::now()
}

fn bar(json: bool, limit: Duration, name: &str) -> ProgressBar {
    let length = limit.as_millis().try_into().unwrap_or(u64::MAX);
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(length) };
    let style = ProgressStyle::with_template("{prefix:16} {bar:30} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(name.to_owned());
    bar
}

/// So many a second, in thousands.
pub(super) fn rate(count: usize, seconds: f64) -> String {
    let a_second = u32::try_from(count).map_or(f64::MAX, f64::from) / seconds.max(0.001);
    format!("{:.0}k", a_second / 1000.0)
}
