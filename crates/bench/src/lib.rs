//! The benches of `polder bench`: what a part of Polder costs, next to what somebody would use
//! instead of it.
//!
//! # Vocabulary
//! - **Bench**: a part that is measured ([`Bench`]); a function that returns rows.
//! - **Case**: one thing that the part does.
//! - **Baseline**: what else would do it.
//! - **Row**: a case, a baseline, and the figures of both ([`Row`]). Its **ratio** is above 1
//!   where Polder is better than the baseline, whatever the unit.
//!
//! # The rules
//! - Baseline and Polder are measured in the same run, in turns (A B A B ...), so that whatever
//!   else the machine does meets both. What is told is the median of the turns. A baseline that is
//!   called *goal* is a number that was set, not measured.
//! - Both do the same work and are given their input in the same way. A baseline that could not be
//!   measured at the size of the case is measured at another, and the note says at which.

mod access;
mod apart;
mod bare;
mod convert;
mod dirty;
mod faults;
mod guest;
mod here;
mod hugepages;
mod machine;
mod map;
mod pins;
mod prefault;
mod stall;
mod turns;
mod userfault;

use serde::Serialize;

/// A part of Polder that can be measured.
#[derive(Debug)]
pub struct Bench {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it measures, in a line.
    pub about: &'static str,
    /// Measures; tells how far it is while it does.
    pub run: fn(&mut dyn FnMut(Progress)) -> Measured,
}

/// The rows of a bench, or why there are none.
pub type Measured = Result<Vec<Row>, BenchError>;

/// How far a bench is.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The parts done.
    pub done: usize,
    /// The parts there are.
    pub of: usize,
    /// What it does now.
    pub doing: String,
}

/// A case, measured with a baseline and with Polder.
#[derive(Clone, PartialEq, Serialize, Debug)]
pub struct Row {
    /// What is done.
    pub case: String,
    /// What Polder is compared with.
    pub baseline: &'static str,
    /// What the two values are in.
    pub unit: &'static str,
    /// The baseline's; not a number where this machine lacks something, as the other two.
    pub baseline_value: f64,
    /// Polder's.
    pub polder_value: f64,
    /// How many times better Polder is: above 1, better; below 1, worse.
    pub ratio: f64,
    /// What else one has to know; often nothing. Why there are no figures, if there are none.
    pub note: String,
}

impl Row {
    /// A row of costs, where the smaller value is the better one.
    fn of_costs(case: String, baseline: &'static str, unit: &'static str, values: Costs) -> Self {
        let Costs { baseline: baseline_value, polder: polder_value } = values;
        let ratio = baseline_value / polder_value;
        Self { case, baseline, unit, baseline_value, polder_value, ratio, note: String::new() }
    }

    /// A row of what this machine lacks something for. It has no figures, which are `null` in JSON.
    fn left_out(case: String, baseline: &'static str, unit: &'static str, why: &str) -> Self {
        let values = Costs { baseline: f64::NAN, polder: f64::NAN };
        Self { note: format!("left out: {why}"), ..Self::of_costs(case, baseline, unit, values) }
    }
}

/// What a case costs, in whatever unit.
#[derive(Clone, Copy, Debug)]
struct Costs {
    baseline: f64,
    polder: f64,
}

/// All that one bench found.
#[derive(Clone, Serialize, Debug)]
pub struct Report {
    /// The bench's name.
    pub bench: &'static str,
    /// Where it ran: CPU, cores, kernel.
    pub machine: String,
    /// What it found.
    pub rows: Vec<Row>,
}

/// Every bench.
pub const ALL: &[Bench] = &[
    map::BENCH,
    pins::BENCH,
    machine::BENCH,
    faults::BENCH,
    convert::BENCH,
    stall::BENCH,
    access::BENCH,
    prefault::BENCH,
    hugepages::BENCH,
    userfault::BENCH,
    dirty::BENCH,
];

/// No bench has this name.
#[derive(Debug, thiserror::Error)]
#[error("there is no bench `{name}`")]
pub struct UnknownBench {
    name: String,
}

impl UnknownBench {
    /// What to do instead.
    pub fn way_out(&self) -> String {
        let names: Vec<&str> = ALL.iter().map(|bench| bench.name).collect();
        format!("one of: {}", names.join(", "))
    }
}

/// A bench can't be run on this machine.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No VM can be had.
    #[error("there is no VM to measure")]
    Vm(#[from] polder_vmm::RunError),
    /// No memory of Polder's can be had, or it failed.
    #[error("there is no memory to measure")]
    Memory(#[from] polder::Error),
    /// The file to fill memory from can't be written or read.
    #[error("the file to measure with can't be had at {path}", path = .path.display())]
    File {
        /// Where it was to be.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A guest did not find what it should have.
    #[error("the guest failed: {0}")]
    Guest(String),
    /// The kernel refused what the baseline does.
    #[error("the baseline can't be measured")]
    Baseline(#[from] polder_linux::Error),
}

impl BenchError {
    /// Whether this machine lacks what is measured, or does not let this user have it.
    fn is_missing(&self) -> bool {
        matches!(self, Self::Vm(_) | Self::Memory(polder::Error::Missing { .. }))
    }

    /// What the user can do about it.
    pub fn way_out(&self) -> Option<&'static str> {
        match self {
            Self::Vm(error) => error.way_out(),
            Self::Memory(error) => error.way_out(),
            Self::File { .. } => Some("have 256M free there, or set TMPDIR"),
            Self::Guest(_) => Some("report it: this is a bug in Polder"),
            Self::Baseline(_) => Some("see what this machine offers: polder doctor"),
        }
    }
}

impl Bench {
    /// The bench called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> Result<&'static Self, UnknownBench> {
        let found = ALL.iter().find(|bench| bench.name == name);
        found.ok_or_else(|| UnknownBench { name: name.to_owned() })
    }

    /// Measures.
    ///
    /// # Errors
    /// Where this machine lacks what is to be measured: KVM, userfaultfd.
    pub fn report(&self, progress: &mut dyn FnMut(Progress)) -> Result<Report, BenchError> {
        let rows = (self.run)(progress)?;
        Ok(Report { bench: self.name, machine: here::describe(), rows })
    }
}

#[cfg(test)]
mod tests {
    pub(crate) use polder_require::Facility;
    use polder_require::require;

    use super::{BenchError, Measured, Row};

    /// The rows of a bench, unless this machine lacks what it measures: then says so. Any other error is
    /// one of ours.
    pub(crate) fn found(facility: Facility, measured: Measured) -> Option<Vec<Row>> {
        use std::error::Error;
        let found = measured.map_err(|error| {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            assert!(is_lacked(&error), "{error}{source}");
            format!("{error}{source}")
        });
        require(facility, found)
    }

    fn is_lacked(error: &BenchError) -> bool {
        use polder::Error::{HugePages, Missing, NotOffered};
        use polder_linux::Errno;
        match error {
            BenchError::Vm(_) | BenchError::File { .. } => true,
            BenchError::Memory(error) => {
                matches!(error, HugePages { .. } | Missing { .. } | NotOffered { .. })
            }
            BenchError::Baseline(error) => {
                [Errno::PERM, Errno::ACCESS, Errno::NOSYS, Errno::NOENT].contains(&error.errno)
            }
            BenchError::Guest(_) => false,
        }
    }
}
