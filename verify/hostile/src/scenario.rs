//! A scenario's text.

use polder_play::{Scenario, Verb, parse};

/// Reads a text as a scenario.
///
/// # Panics
/// If what was read is written as something else.
pub fn scenario(bytes: &[u8]) {
    let Ok(mut scenario) = parse(&String::from_utf8_lossy(bytes)) else { return };
    let written = scenario.to_string();
    match parse(&written) {
        Ok(mut again) => {
            forget_lines(&mut scenario);
            forget_lines(&mut again);
            assert_eq!(again, scenario, "{written}");
        }
        Err(error) => panic!("it is written as what is none: {error}\n{written}"),
    }
}

/// Where in its text a step stands is not what it says.
fn forget_lines(scenario: &mut Scenario) {
    for step in &mut scenario.steps {
        step.line = 0;
        if let Verb::Look(look) = &mut step.verb {
            look.line = 0;
        }
    }
    scenario.expect.iter_mut().for_each(|look| look.line = 0);
}
