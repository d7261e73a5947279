//! The command line of `cargo xtask lab`.

use std::ffi::OsString;

const USAGE: &str = "\
usage: cargo xtask lab [--cpus N] [--memory MIB] [--gigantic N] [--timeout SECONDS]
                       [--matrix [--json] | -- COMMAND [ARGUMENT]...]
  without a command: the behaviour table and `polder run`, on every host
  --matrix: the behaviour table in Debian's kernels too; writes docs/kernels.md";

/// What was asked for.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Arguments {
    /// CPUs that the command runs on.
    pub(super) cpus: u32,
    /// Its memory, in MiB.
    pub(super) memory: u32,
    /// Huge pages of 1G that are set aside as it boots, beside that memory.
    pub(super) gigantic: u32,
    /// After how many seconds it counts as hung.
    pub(super) timeout: u32,
    /// Whether the table is run in all kernels.
    pub(super) matrix: bool,
    /// Whether what came of that is printed as JSON.
    pub(super) json: bool,
    /// What to run; nothing means the table.
    pub(super) command: Vec<OsString>,
}

impl Arguments {
    pub(super) fn parse(given: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut parsed = Self {
            cpus: 2,
            memory: 1024,
            gigantic: 0,
            timeout: 1800,
            matrix: false,
            json: false,
            command: Vec::new(),
        };
        let mut given = given;
        while let Some(option) = given.next() {
            // The kernel is built for 8 CPUs, of which it keeps one, and takes some 100 MiB.
            let (value, allowed) = match option.to_str() {
                Some("--cpus") => (&mut parsed.cpus, 1..=7),
                Some("--memory") => (&mut parsed.memory, 256..=1 << 20),
                Some("--gigantic") => (&mut parsed.gigantic, 0..=64),
                Some("--timeout") => (&mut parsed.timeout, 1..=86_400),
                Some("--matrix") => {
                    parsed.matrix = true;
                    continue;
                }
                Some("--json") => {
                    parsed.json = true;
                    continue;
                }
                Some("--") => {
                    parsed.command = given.by_ref().collect();
                    if parsed.command.is_empty() {
                        return Err(wrong("-- without a command"));
                    }
                    break;
                }
                _ => return Err(wrong(&format!("{} is no option", option.display()))),
            };
            let number = given.next().and_then(|number| number.to_str()?.parse().ok());
            *value = number.filter(|number| allowed.contains(number)).ok_or_else(|| {
                let (least, most) = allowed.into_inner();
                wrong(&format!("{} takes a number from {least} to {most}", option.display()))
            })?;
        }
        if parsed.matrix && !parsed.command.is_empty() {
            return Err(wrong("--matrix runs the table, and no other command"));
        }
        if parsed.json && !parsed.matrix {
            return Err(wrong("--json is for --matrix"));
        }
        Ok(parsed)
    }
}

fn wrong(what: &str) -> String {
    format!("{what}\n{USAGE}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_come_first_and_the_command_is_left_as_it_is() {
        let parsed = parse("--cpus 3 --memory 512 --gigantic 2 --timeout 9 -- ls --cpus x -- y");
        let parsed = parsed.unwrap();
        assert_eq!((parsed.cpus, parsed.memory, parsed.gigantic, parsed.timeout), (3, 512, 2, 9));
        assert_eq!(parsed.command, ["ls", "--cpus", "x", "--", "y"]);
        assert!(!parsed.matrix && !parsed.json);
        assert_eq!(parse("").unwrap().command, [""; 0]);
        let parsed = parse("--json --cpus 1 --matrix").unwrap();
        assert_eq!((parsed.matrix, parsed.json, parsed.cpus), (true, true, 1));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_the_usage() {
        let numbers = ["--cpus", "--cpus 0", "--cpus 8", "--memory 1", "--timeout x"];
        let words = ["ls", "--", "--json", "--json -- ls", "--matrix -- ls"];
        for line in numbers.into_iter().chain(words) {
            assert!(parse(line).unwrap_err().contains("usage:"), "{line}");
        }
    }
}
