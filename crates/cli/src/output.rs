//! Printing to somebody who may have stopped reading.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Prints the command's result. Returns `status`, also when the reader has gone (`| head`); where
/// it can't be written, says so and returns 2.
pub(crate) fn print(text: &str, status: ExitCode) -> ExitCode {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            note(&format!("error: the result can't be written: {error}"));
            ExitCode::from(2)
        }
        _ => status,
    }
}

/// Prints a line beside the result.
pub(crate) fn note(line: &str) {
    // Where this can't be written there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{line}");
}
