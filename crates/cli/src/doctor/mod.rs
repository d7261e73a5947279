//! `polder doctor`.
//!
//! | file | is |
//! |---|---|
//! | `machine`, `parse` | what files say |
//! | `facts` | all that was looked at: files, KVM, userfaultfd, a trial of host memfd |
//! | `follow`, `ways_out` | what follows for each host, and what brings what is missing |
//! | `text`, `object` | all that, for a person and for a program |

mod facts;
mod follow;
mod machine;
mod object;
mod parse;
mod text;
mod ways_out;

use std::process::ExitCode;

use clap::Args;

use crate::output;

/// Tell what this machine offers to Polder, and what would bring what it lacks.
///
/// Nothing is changed: KVM is asked on virtual machines that are thrown away, and each host is
/// tried with a page of memory.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder doctor                           hosts first, then what they rest on
  polder doctor --json | jq .can_run      the host that `polder run` takes
  polder doctor --json | jq -r '.hosts[] | select(.usable) | .host'
  polder doctor --json | jq -r '.hosts[].needs[] | select(.ok == false) | .\"try\"'

Exit status: 0 it has looked, also where things are missing, 2 the result can't be written.")]
pub(crate) struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What programs can have of this machine's memory now, in bytes, as the kernel estimates it.
pub(crate) fn memory_available() -> Option<u64> {
    parse::kib_field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let facts = facts::Facts::look();
    let hosts = follow::hosts(&facts);
    let text = if arguments.json {
        format!("{}\n", object::of(&facts, &hosts))
    } else {
        text::of(&facts, &hosts)
    };
    output::print(&text, ExitCode::SUCCESS)
}
