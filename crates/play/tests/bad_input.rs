//! What is no scenario: where, and what was meant. And nothing that a file says makes us panic.

use polder::HostKind;
use polder_play::{Options, Verdict, limits, parse, play};
use proptest::prelude::*;

const HEAD: &str = "about = \"a\"\n[memory]\npages = 4\n";

/// Why a text is refused.
fn refused(text: &str) -> String {
    match parse(text) {
        Ok(scenario) => panic!("it is read: {scenario}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_misspelt_word_is_told_with_its_line_and_what_was_meant() {
    for (body, why) in [
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"convert\"\ncontets = \"0..2\"\nto = \"shared\"\n",
            "7:1: the step `convert` has no key `contets`; did you mean `contents`?",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"conver\"\n",
            "6:6: `do` can't be \"conver\"; did you mean \"convert\"?",
        ),
        (
            "[[step]]\nactor = \"vm\"\ndo = \"settle\"\n",
            "5:9: `actor` can't be \"vm\"; did you mean \"vmm\"?",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\npage = 0\nexpect = \"pined\"\n",
            "8:10: `expect` can't be \"pined\"; did you mean \"pinned\"?",
        ),
        (
            "[[step]]\nactor = \"disk\"\ndo = \"settle\"\n",
            "5:9: `actor` can't be \"disk\"; known here: device, guest, kernel, process, vmm; others \
             are declared, by [[actor]] with `name` and `is`",
        ),
        ("[[steps]]\n", "4:3: a scenario has no key `steps`; did you mean `step`?"),
    ] {
        assert_eq!(refused(&format!("{HEAD}{body}")), why);
    }
}

#[test]
fn page_tables_that_a_guest_cannot_have_are_told() {
    for (vm, why) in [
        ("root = \"shadow\"", "needs the key `tables`"),
        ("root = \"shadov\"\ntables = 0", "did you mean \"shadow\"?"),
        ("root = \"shadow\"\ntables = 1", "`tables` is the first of 4 pages of the memory"),
        ("root = \"nested\"\ntables = 0xffffffff", "`tables` is the first of 4 pages"),
        ("root = \"tdp\"\ntables = 0", "a guest's own tables are nothing to TDP"),
        ("tables = 0", "`tables` goes with `root`"),
        ("asid = 1\nroot = \"shadow\"\ntables = 0", "can't be shadowed"),
    ] {
        let text = format!("{HEAD}[[vm]]\nname = \"vm\"\n{vm}\n");
        let told = refused(&text);
        assert!(told.contains(why), "{vm}: {told}");
    }
    // What the text alone does not say.
    let step = "[[step]]\nactor = \"guest\"\ndo = \"pte\"\npage = 0\n";
    for (vm, why) in [
        ("root = \"shadow\"\ntables = 0\nslots = []", "needs a slot"),
        (
            "root = \"shadow\"\ntables = 0\nslots = [{ slot = 0, pages = \"0..4\", gpa = \"0x1fe000\" }]",
            "lies in one 2M",
        ),
    ] {
        let text = format!("{HEAD}[[vm]]\nname = \"vm\"\n{vm}\n{step}");
        let scenario = parse(&text).unwrap_or_else(|error| panic!("{vm}: {error}"));
        let played = play(&scenario, HostKind::Machine, Options::default());
        assert!(
            matches!(&played.verdict, Verdict::Failed(said) if said.contains(why)),
            "{played:?}"
        );
    }
}

#[test]
fn what_is_missing_or_of_the_wrong_kind_is_told() {
    for (body, why) in [
        ("", "1:1: a scenario needs a `[[step]]`"),
        ("[[step]]\nactor = \"vmm\"\n", "4:1: a step needs the key `do`"),
        ("[[step]]\ndo = \"settle\"\n", "4:1: the step `settle` needs the key `actor`"),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\n",
            "4:1: the step `discard` names pages by one of `page`, `pages` and `gpa`",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\npage = true\n",
            "7:8: `page` is a number, not a boolean",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\npages = \"3\"\n",
            "7:9: `pages` is a range such as \"2..6\", its end left out",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\npages = \"3..3\"\n",
            "7:9: `pages`: no page lies in 3..3",
        ),
        (
            "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\ngpa = \"0x1001\"\n",
            "7:7: `gpa` is the address of a page, a multiple of 0x1000; say where in the page by `at`",
        ),
    ] {
        assert_eq!(refused(&format!("{HEAD}{body}")), why);
    }
}

#[test]
fn private_pages_that_would_be_owed_to_who_alone_can_fill_them_are_told() {
    let text = |starts: &str| {
        format!(
            "about = \"a\"\n[memory]\npages = 4\nplatform = \"snp\"\nowed = true\n{starts}\
                 [[step]]\nactor = \"vmm\"\ndo = \"settle\"\n"
        )
    };
    assert_eq!(
        refused(&text("")),
        "5:8: private pages of snp can't be owed, for the guest alone can fill them: \
         add `starts = \"shared\"`"
    );
    assert!(parse(&text("starts = \"shared\"\n")).is_ok());
}

#[test]
fn an_impossible_step_is_told() {
    let step = |rest: &str| format!("{HEAD}[[step]]\n{rest}\n");
    assert_eq!(
        refused(&step("actor = \"device\"\ndo = \"convert\"\npage = 0\nto = \"shared\"")),
        "5:9: a device can't `convert`; it is done by: vmm, guest"
    );
    assert_eq!(
        refused(&step("actor = \"vmm\"\ndo = \"resume\"")),
        "4:1: \"vmm\" is amid nothing that could be resumed; \
         hold a step of his first, or expect that it waits"
    );
    let held =
        step("actor = \"vmm\"\ndo = \"convert\"\npage = 0\nto = \"shared\"\nhold = \"drained\"");
    assert_eq!(
        refused(&held),
        "4:1: the scenario ends, and \"vmm\" is amid this step; resume it, and say what comes of it"
    );
    assert_eq!(
        refused(&format!("{held}[[step]]\nactor = \"vmm\"\ndo = \"settle\"\n")),
        "10:1: \"vmm\" is still amid his step of line 4; \
         resume it first, or have another actor do this"
    );
    let simulated = "about = \"a\"\nhosts = [\"memfd\"]\n[memory]\npages = 4\n[[step]]\n\
                     actor = \"kernel\"\ndo = \"psmash\"\npage = 0\n";
    assert!(refused(simulated).contains("5:1: host memfd can't do this step"));
    assert!(
        refused(&step("do = \"look\"\npage = 4\nvisibility = \"private\"")).contains("4 pages")
    );
}

#[test]
fn what_is_too_large_is_told_at_once() {
    let step = "[[step]]\nactor = \"vmm\"\ndo = \"settle\"\n";
    let many = format!("{HEAD}{}", step.repeat(limits::STEPS_MAX + 1));
    assert!(refused(&many).contains("2001 times `step`; 2000 are the most"), "{}", refused(&many));
    let million = format!("{HEAD}{}", step.repeat(1_000_000));
    assert!(refused(&million).contains("tell a shorter story"));
    assert!(refused("about = \"a\"\n[memory]\nsize = \"16T\"\n").contains("3:8: memory has 1 to"));
    let pages = "[[step]]\nactor = \"vmm\"\ndo = \"discard\"\npages = \"0..4503599627370495\"\n";
    assert!(refused(&format!("{HEAD}{pages}")).contains("are the most"));
    let deep = format!("about = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(refused(&deep).starts_with("1:"), "{}", refused(&deep));
}

#[test]
fn as_many_steps_as_may_be_are_played_within_seconds() {
    let step = "[[step]]\nactor = \"vmm\"\ndo = \"convert\"\npages = \"0..4\"\nto = \"shared\"\n";
    let scenario = parse(&format!("{HEAD}{}", step.repeat(limits::STEPS_MAX))).unwrap();
    let played = play(&scenario, HostKind::Machine, Options::default());
    assert_eq!(played.verdict, Verdict::Passed);
    assert_eq!(played.steps.len(), limits::STEPS_MAX);
}

#[test]
fn who_waits_for_ever_ends_with_the_scenario() {
    let text = "about = \"a\"\n[memory]\npages = 4\nstarts = \"shared\"\nowed = true\n\
                [[step]]\nactor = \"device\"\ndo = \"read\"\npage = 0\n\
                [[step]]\nactor = \"guest\"\ndo = \"read\"\npage = 1\n";
    let played = play(&parse(text).unwrap(), HostKind::Machine, Options::default());
    let Verdict::Failed(why) = played.verdict else { panic!("{:?}", played.verdict) };
    assert_eq!(why, "line 6: waits; \"ok\" was expected");
}

#[test]
fn who_waits_for_a_folio_that_is_locked_ends_with_the_scenario() {
    let text = "about = \"a\"\n[memory]\npages = 4\nstarts = \"shared\"\n\
                [[step]]\nactor = \"kernel\"\ndo = \"allocate\"\npage = 0\nlevel = \"4K\"\n\
                [[step]]\nactor = \"kernel\"\ndo = \"lock\"\npage = 0\n\
                [[step]]\nactor = \"device\"\ndo = \"write\"\npage = 0\nbytes = \"a\"\n";
    let played = play(&parse(text).unwrap(), HostKind::Machine, Options::default());
    let Verdict::Failed(why) = played.verdict else { panic!("{:?}", played.verdict) };
    assert_eq!(why, "line 14: waits; \"ok\" was expected");
}

#[test]
fn who_waits_for_an_entry_that_is_in_use_ends_with_the_scenario() {
    let text = |guest: &str| {
        format!(
            "about = \"a\"\n[memory]\npages = 4\nplatform = \"snp\"\n\
                 [[step]]\nactor = \"kernel\"\ndo = \"allocate\"\npage = 0\nlevel = \"4K\"\n{guest}\
                 [[step]]\nactor = \"kernel\"\ndo = \"rmp-hold\"\npage = 0\n\
                 [[step]]\nactor = \"guest\"\ndo = \"pvalidate\"\npage = 0\nvalidate = false\n"
        )
    };
    // The page is not assigned yet, and can't be; or it is, and can't be rescinded.
    for guest in ["", "[[step]]\nactor = \"guest\"\ndo = \"pvalidate\"\npage = 0\n"] {
        let text = text(guest);
        let played = play(&parse(&text).unwrap(), HostKind::Machine, Options::default());
        let Verdict::Failed(why) = played.verdict else { panic!("{:?}", played.verdict) };
        assert!(why.ends_with("waits; \"ok\" was expected"), "{why}");
    }
}

/// Lines that scenarios are made of, right and wrong.
fn line() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "actor",
        "do",
        "page",
        "pages",
        "gpa",
        "count",
        "to",
        "contents",
        "hold",
        "expect",
        "bytes",
        "at",
        "as",
        "length",
        "level",
        "size",
        "assign",
        "immutable",
        "slot",
        "vm",
        "name",
        "wait",
    ]);
    let value = prop::sample::select(vec![
        "0",
        "1",
        "3",
        "4",
        "-1",
        "511",
        "4611686018427387904",
        "true",
        "false",
        "\"0..4\"",
        "\"2..9\"",
        "\"0..512\"",
        "\"0x40000000\"",
        "\"0x40001000\"",
        "\"0xfffffffffffff000\"",
        "\"private\"",
        "\"shared\"",
        "\"zero\"",
        "\"preserve\"",
        "\"unmapped\"",
        "\"protected\"",
        "\"waits\"",
        "\"held\"",
        "\"ok\"",
        "\"2M\"",
        "\"4K\"",
        "\"1G\"",
        "\"guest\"",
        "\"vmm\"",
        "\"x\"",
    ]);
    (key, value).prop_map(|(key, value)| format!("{key} = {value}"))
}

/// A step that is a step, more often than not.
fn step() -> impl Strategy<Value = String> {
    let place = prop::sample::select(vec![
        "page = 0",
        "page = 1",
        "page = 3",
        "page = 1023",
        "page = 4096",
        "pages = \"0..4\"",
        "pages = \"0..512\"",
        "pages = \"1..513\"",
        "pages = \"512..1024\"",
        "pages = \"1020..1030\"",
        "gpa = \"0x40000000\"\ncount = 512",
        "gpa = \"0x40001000\"",
        "gpa = \"0xfffffffffffff000\"",
        "gpa = 0",
        "gpa = \"0xffffffffff000\"\ncount = 4",
    ]);
    let verb = prop::sample::select(vec![
        ("vmm", "convert", "to = \"shared\""),
        ("vmm", "convert", "to = \"private\"\nwait = false"),
        ("guest", "convert", "to = \"private\"\ncontents = \"zero\""),
        ("guest", "convert", "to = \"shared\""),
        ("vmm", "want", "to = \"shared\""),
        ("vmm", "discard", ""),
        ("vmm", "populate", "bytes = \"x\""),
        ("vmm", "fail", ""),
        ("guest", "read", "as = \"shared\"\nat = 4095"),
        ("guest", "write", "bytes = \"secret\"\nat = 4090"),
        ("vmm", "read", "length = 5000"),
        ("vmm", "write", "bytes = \"copied\""),
        ("device", "read", "length = 8192"),
        ("device", "write", "bytes = \"touched\"\nat = 4094"),
        ("process", "read", "at = 4095"),
        ("process", "write", "bytes = \"xyz\""),
        ("device", "pin", ""),
        ("device", "refer", ""),
        ("process", "refer", ""),
        ("device", "gup-fast", ""),
        ("process", "gup-fast", ""),
        ("guest", "pvalidate", ""),
        ("guest", "pvalidate", "size = \"2M\"\nvalidate = false"),
        ("kernel", "allocate", "level = \"4K\""),
        ("kernel", "allocate", "level = \"2M\""),
        ("kernel", "allocate", "level = \"1G\""),
        ("kernel", "lock", ""),
        ("kernel", "unlock", ""),
        ("kernel", "split", ""),
        ("kernel", "merge", "level = \"2M\""),
        ("kernel", "merge", "level = \"1G\""),
        ("kernel", "map", "level = \"2M\""),
        ("kernel", "map", "level = \"4K\""),
        ("kernel", "zap", ""),
        ("kernel", "rmpupdate", "assign = true\nsize = \"2M\""),
        ("kernel", "rmpupdate", "assign = true"),
        ("kernel", "rmpupdate", "assign = false\nimmutable = true"),
        ("kernel", "rmpupdate", "assign = true\nimmutable = true"),
        ("kernel", "psmash", ""),
        ("kernel", "unsmash", ""),
        ("kernel", "reclaim", "size = \"2M\""),
        ("kernel", "rmp-hold", ""),
        ("kernel", "rmp-release", ""),
    ]);
    let bare = prop::sample::select(vec![
        ("kernel", "no-memory", ""),
        ("vmm", "unbind", "slot = 0"),
        ("vmm", "bind", "slot = 1\npages = \"0..8\"\ngpa = \"0x80000000\""),
        ("vmm", "bind", "slot = 0\npages = \"0..2000\"\ngpa = \"0xfffffffff000\""),
        ("device", "unpin", ""),
        ("device", "release", ""),
        ("vmm", "settle", ""),
    ]);
    prop_oneof![
        8 => (verb, place).prop_map(|((actor, verb, rest), place)| {
            format!("[[step]]\nactor = \"{actor}\"\ndo = \"{verb}\"\n{place}\n{rest}\n")
        }),
        1 => bare.prop_map(|(actor, verb, rest)| {
            format!("[[step]]\nactor = \"{actor}\"\ndo = \"{verb}\"\n{rest}\n")
        }),
    ]
}

/// Plays a text as far as it can be, whatever its steps come to: nobody panics, and it ends.
fn play_on(text: &str) {
    let Ok(mut scenario) = parse(text) else { return };
    loop {
        let played = play(&scenario, HostKind::Machine, Options::default());
        let Verdict::Failed(why) = played.verdict else { return };
        assert!(!why.contains("bug of Polder's"), "{why}\n{text}");
        let ends = !why.contains("neither ends") && !why.contains("never ends");
        assert!(ends, "{why}\n{text}");
        // Expect what it came to, and play on.
        let Some(last) = played.steps.last().filter(|step| step.unmet.is_some()) else { return };
        let at = played.steps.len() - 1;
        if ["held", "waits"].contains(&last.outcome.is.name()) {
            return;
        }
        scenario.steps[at].expect.is = Some(last.outcome.is);
    }
}

/// So many cases as `PROPTEST_CASES` says, or few: some steps take their time.
fn config() -> ProptestConfig {
    let few = ProptestConfig { cases: 96, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default() } else { few }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_bytes_are_read_or_refused(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn any_lines_are_read_or_refused(lines in prop::collection::vec(line(), 0..12)) {
        let _ = parse(&format!("{HEAD}[[step]]\n{}\n", lines.join("\n")));
    }

    #[test]
    fn any_steps_are_played_to_an_end(
        platform in prop::sample::select(vec!["plain", "sw-protected", "snp", "bare"]),
        starts in prop::sample::select(vec!["private", "shared"]),
        steps in prop::collection::vec(step(), 1..14),
    ) {
        let (platform, vm) = match platform {
            "bare" => ("plain", "[[vm]]\nname = \"bare\"\nasid = 1\n"),
            platform => (platform, ""),
        };
        play_on(&format!(
            "about = \"a\"\n[memory]\npages = 1024\nplatform = \"{platform}\"\nstarts = \"{starts}\"\n\
             {vm}{}",
            steps.concat(),
        ));
    }
}
