//! A scenario's text.

use polder_play::parse;

/// Reads a text as a scenario.
///
/// # Panics
/// If what was read is written as something else.
pub fn scenario(bytes: &[u8]) {
    let Ok(scenario) = parse(&String::from_utf8_lossy(bytes)) else { return };
    let written = scenario.to_string();
    match parse(&written) {
        Ok(again) => assert_eq!(again.to_string(), written),
        Err(error) => panic!("it is written as what is none: {error}\n{written}"),
    }
}
