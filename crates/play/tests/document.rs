//! `docs/scenarios.md` has every verb and every word for what comes of one, as the parser knows
//! them, and its example plays.

use std::fmt::Write;
use std::path::PathBuf;

use polder::HostKind;
use polder_play::{Is, Options, VERBS, Verdict, parse, play};

fn document() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/scenarios.md");
    std::fs::read_to_string(path).expect("the document")
}

/// The table of verbs.
fn verbs() -> String {
    let mut table = "| `do` | who | needs | may have | is |\n|---|---|---|---|---|\n".to_owned();
    for verb in VERBS {
        let who: Vec<_> = verb.who.iter().map(|kind| kind.name()).collect();
        let who = match who.len() {
            0 => "nobody in particular".to_owned(),
            5 => "any".to_owned(),
            _ => who.join(", "),
        };
        let (needs, may) = (verb.needs.join(", "), verb.may_have.join(", "));
        let _ = writeln!(table, "| `{}` | {who} | {needs} | {may} | {} |", verb.name, verb.what);
    }
    table
}

/// The table of words.
fn words() -> String {
    let mut table = "| word | says |\n|---|---|\n".to_owned();
    for (_, name, what) in Is::ALL {
        let _ = writeln!(table, "| `{name}` | {what} |");
    }
    table
}

#[test]
fn the_document_has_every_verb_and_every_word() {
    let document = document();
    for table in [verbs(), words()] {
        assert!(document.contains(&table), "docs/scenarios.md should have:\n{table}");
    }
}

#[test]
fn the_documents_examples_play() {
    let document = document();
    let examples: Vec<_> = document.split("```toml\n").skip(1).collect();
    assert!(!examples.is_empty());
    for example in examples {
        let text = example.split("```").next().unwrap_or_default();
        let scenario = parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let played = play(&scenario, HostKind::Machine, Options::default());
        assert_eq!(played.verdict, Verdict::Passed, "{text}");
    }
}

/// The text of every Rust file below a folder.
fn sources(folder: PathBuf, into: &mut String) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(path, into);
        } else if path.extension().is_some_and(|it| it == "rs") {
            *into += &std::fs::read_to_string(path).unwrap_or_default();
        }
    }
}

#[test]
fn what_the_answers_about_prefault_name_is_there() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("docs/prefault.md")).expect("the document");
    let (mut code, mut tests, mut stories) = (String::new(), 0, 0);
    ["crates", "verify"].iter().for_each(|folder| sources(root.join(folder), &mut code));
    let is_name = |name: &&str| name.contains('_') && !name.contains(char::is_whitespace);
    for name in text.split('*').filter(is_name).filter(|name| !name.contains('`')) {
        let is_there =
            code.contains(&format!("fn {name}(")) || code.contains(&format!("\"{name}:"));
        assert!(is_there, "docs/prefault.md: there is no {name}");
        tests += 1;
    }
    for name in text.split('`').filter(|name| name.ends_with(".toml") && !name.contains('*')) {
        let file = name.trim_start_matches("scenarios/");
        assert!(root.join("scenarios").join(file).exists(), "docs/prefault.md: no {name}");
        stories += 1;
    }
    assert!(tests >= 10 && stories >= 12, "{tests} tests and {stories} stories");
}
