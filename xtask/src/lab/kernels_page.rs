//! The page of the kernels, `docs/kernels.md`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

const INTRODUCTION: &str = "\
# Polder on one kernel and another

This file is written by `cargo xtask lab --matrix`, which boots each kernel on an emulated AMD
processor with nested paging (`docs/lab.md`), and runs `polder doctor` and the behaviour table
(`verify/behaviour/table.md`) there. It records what came of that: a failure is one of Polder on
that kernel, or one of the kernel's. *lab* is the kernel with private memory; the others are
Debian's packages as they are. The simulated machine needs nothing of a kernel. Why a behaviour is not applicable to a host is in the table.
";

/// The words for what may come of a behaviour, in the order of their columns.
const RESULTS: [&str; 4] = ["ok", "n/a", "skipped", "failed"];

/// The most of a reason that is told.
const REASON: usize = 300;

/// The page, of what `--matrix --json` prints.
pub(super) fn page(came: &Value) -> String {
    let kernels: Vec<&Value> = list(&came["kernels"]).collect();
    let mut page = Page { text: INTRODUCTION.to_owned(), reasons: Vec::new() };
    page.kernels(&kernels);
    let tried: Vec<&Value> = kernels.into_iter().filter(|kernel| kernel["why"].is_null()).collect();
    if !tried.is_empty() {
        page.offers(&tried);
        page.counts(&tried);
        page.behaviours(&tried);
    }
    page.text.push('\n');
    for (number, reason) in (1..).zip(&page.reasons) {
        let _ = writeln!(page.text, "[^{number}]: {reason}");
    }
    page.text
}

struct Page {
    text: String,
    /// What the footnotes say.
    reasons: Vec<String>,
}

impl Page {
    fn kernels(&mut self, kernels: &[&Value]) {
        self.table("Kernels", &["kernel", "Linux", "from", "tried"]);
        for kernel in kernels {
            let tried = match kernel["why"].as_str() {
                None => "yes".to_owned(),
                Some(why) => format!("no: {}", cell(&anywhere(why))),
            };
            let release = word(&kernel["doctor"]["machine"]["kernel"]);
            self.row(&[word(&kernel["kernel"]), release, word(&kernel["from"]), tried]);
        }
    }

    /// What the doctor found.
    fn offers(&mut self, kernels: &[&Value]) {
        self.by_kernel("What they offer", "", kernels);
        self.text.push_str(&row_of("MMU", kernels, |it| word(&it["doctor"]["kvm"]["mmu"]["kind"])));
        self.text.push_str(&row_of("hypercalls by", kernels, |it| {
            word(&it["doctor"]["kvm"]["hypercalls_by"])
        }));
        self.text.push_str(&row_of("types of VM", kernels, |it| {
            let types = list(&it["doctor"]["kvm"]["vm_types"]);
            let made = types.filter(|one| one["can_be_made"] == true);
            listed(made.map(|one| word(&one["type"])))
        }));
        self.hosts(kernels);
        self.by_kernel("KVM's capabilities", "", kernels);
        let all = kernels.iter().flat_map(|it| {
            let types = list(&it["doctor"]["kvm"]["vm_types"]);
            types.flat_map(|one| one["capabilities"].as_object().into_iter().flat_map(|c| c.keys()))
        });
        let all: std::collections::BTreeSet<&String> = all.collect();
        for capability in all {
            self.text.push_str(&row_of(&format!("`{capability}`"), kernels, |it| {
                by_type(&it["doctor"]["kvm"]["vm_types"], capability)
            }));
        }
        self.by_kernel("userfaultfd's features", "", kernels);
        let features = |it: &&Value| {
            let features = list(&it["doctor"]["userfaultfd"]["features"]);
            features.map(word).collect::<Vec<_>>()
        };
        for feature in in_order(kernels.iter().flat_map(features)) {
            self.text.push_str(&row_of(&format!("`{feature}`"), kernels, |it| {
                let has = features(&it).contains(&feature);
                if has { "yes" } else { "-" }.to_owned()
            }));
        }
    }

    /// What each host can be, and what it lacks.
    fn hosts(&mut self, kernels: &[&Value]) {
        for name in names(kernels, &|it| list(&it["doctor"]["hosts"]), "host") {
            let host = |it: &Value| find(&it["doctor"]["hosts"], "host", &name);
            let cells = kernels.iter().map(|kernel| {
                let host = host(kernel);
                let usable = mark(&host["usable"]);
                self.noted(usable, host["why"].as_str().filter(|_| host["usable"] != true))
            });
            let cells: Vec<String> = cells.collect();
            self.row(&[vec![format!("host {name}")], cells].concat());
            for part in ["needs", "features"] {
                let findings = |it| names_of(&host(it)[part], "name");
                for finding in in_order(kernels.iter().flat_map(|kernel| findings(kernel))) {
                    let cells: Vec<String> = kernels
                        .iter()
                        .map(|kernel| {
                            let host = host(kernel);
                            let found = find(&host[part], "name", &finding);
                            let missing = found["ok"] != true;
                            self.noted(
                                mark(&found["ok"]),
                                found["what"].as_str().filter(|_| missing),
                            )
                        })
                        .collect();
                    self.row(&[vec![format!("host {name}: {finding}")], cells].concat());
                }
            }
        }
    }

    /// How many behaviours came out how.
    fn counts(&mut self, kernels: &[&Value]) {
        self.by_kernel("Behaviours", "host", kernels);
        for host in hosts(kernels) {
            self.text.push_str(&row_of(&host, kernels, |it| {
                let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
                for behaviour in list(&it["behaviours"]).filter(|one| one["host"] == *host) {
                    *counts.entry(behaviour["result"].as_str().unwrap_or("?")).or_default() += 1;
                }
                let counts = RESULTS.iter().filter_map(|result| {
                    counts.get(result).map(|count| format!("{count} {result}"))
                });
                listed(counts)
            }));
        }
    }

    /// Each behaviour that is not the same everywhere, or not well.
    fn behaviours(&mut self, kernels: &[&Value]) {
        for host in hosts(kernels) {
            // By section and case: what came of it on each kernel.
            let mut rows: Vec<(String, Vec<Value>)> = Vec::new();
            for (at, kernel) in kernels.iter().enumerate() {
                for one in list(&kernel["behaviours"]).filter(|one| one["host"] == *host) {
                    let name = format!("{}: {}", word(&one["section"]), word(&one["case"]));
                    let row = rows.iter().position(|(known, _)| *known == name);
                    let row = row.unwrap_or_else(|| {
                        rows.push((name, vec![Value::Null; kernels.len()]));
                        rows.len() - 1
                    });
                    rows[row].1[at] = one.clone();
                }
            }
            let everywhere = |came: &[Value], result| came.iter().all(|it| it["result"] == result);
            let count = |result| rows.iter().filter(|(_, came)| everywhere(came, result)).count();
            let (ok, not) = (count("ok"), count("n/a"));
            let rest = if rows.len() == ok + not { "" } else { " The others:\n" };
            let _ = writeln!(
                self.text,
                "\n### Host {host}\n\nOn each kernel, {ok} behaviours are ok and {not} not \
                 applicable.{rest}",
            );
            if rest.is_empty() {
                continue;
            }
            self.text.pop();
            self.header(&columns("behaviour", kernels));
            for (name, came) in &rows {
                if everywhere(came, "ok") || everywhere(came, "n/a") {
                    continue;
                }
                let cells = came.iter();
                let cells = cells.map(|it| self.noted(word(&it["result"]), it["why"].as_str()));
                let cells: Vec<String> = cells.collect();
                self.row(&[vec![cell(name)], cells].concat());
            }
        }
    }

    fn by_kernel(&mut self, title: &str, first: &str, kernels: &[&Value]) {
        let columns = columns(first, kernels);
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        self.table(title, &columns);
    }

    fn table(&mut self, title: &str, columns: &[&str]) {
        let _ = write!(self.text, "\n## {title}\n");
        self.header(columns);
    }

    fn header(&mut self, columns: &[impl AsRef<str>]) {
        let names: Vec<&str> = columns.iter().map(AsRef::as_ref).collect();
        let rule = "|---".repeat(columns.len());
        let _ = write!(self.text, "\n| {} |\n{rule}|\n", names.join(" | "));
    }

    fn row(&mut self, cells: &[String]) {
        let _ = writeln!(self.text, "| {} |", cells.join(" | "));
    }

    /// A word with its reason as a footnote: the same reason has one number.
    fn noted(&mut self, word: String, reason: Option<&str>) -> String {
        let Some(reason) = reason.map(cell) else { return word };
        let known = self.reasons.iter().position(|known| *known == reason);
        let number = known.unwrap_or_else(|| {
            self.reasons.push(reason);
            self.reasons.len() - 1
        }) + 1;
        format!("{word}[^{number}]")
    }
}

fn columns(first: &str, kernels: &[&Value]) -> Vec<String> {
    let kernels = kernels.iter().map(|kernel| word(&kernel["kernel"]));
    std::iter::once(first.to_owned()).chain(kernels).collect()
}

fn row_of(name: &str, kernels: &[&Value], of: impl Fn(&Value) -> String) -> String {
    let cells: Vec<String> = kernels.iter().map(|kernel| of(kernel)).collect();
    format!("| {name} | {} |\n", cells.join(" | "))
}

/// The hosts of the table, in its order.
fn hosts(kernels: &[&Value]) -> Vec<String> {
    names(kernels, &|it| list(&it["behaviours"]), "host")
}

fn names<'a, I: Iterator<Item = &'a Value>>(
    kernels: &[&'a Value],
    entries: &dyn Fn(&'a Value) -> I,
    key: &str,
) -> Vec<String> {
    in_order(kernels.iter().flat_map(|kernel| entries(kernel)).map(|entry| word(&entry[key])))
}

fn names_of(entries: &Value, key: &str) -> Vec<String> {
    list(entries).map(|entry| word(&entry[key])).collect()
}

/// Each name once, where it comes first.
fn in_order(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = std::collections::BTreeSet::new();
    all.filter(|name| seen.insert(name.clone())).collect()
}

fn find(entries: &Value, key: &str, name: &str) -> Value {
    list(entries).find(|entry| entry[key] == *name).cloned().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What a capability is: one number, or where it depends on the VM's type one for each.
fn by_type(types: &Value, capability: &str) -> String {
    let values: Vec<(String, String)> = list(types)
        .filter(|one| one["can_be_made"] == true)
        .map(|one| (word(&one["type"]), word(&one["capabilities"][capability])))
        .collect();
    match values.as_slice() {
        [] => "-".to_owned(),
        [(_, first), rest @ ..] if rest.iter().all(|(_, value)| value == first) => first.clone(),
        all => listed(all.iter().map(|(kind, value)| format!("{value} on {kind}"))),
    }
}

fn mark(ok: &Value) -> String {
    match ok.as_bool() {
        Some(true) => "ok",
        Some(false) => "missing",
        None => "unknown",
    }
    .to_owned()
}

fn listed(words: impl Iterator<Item = String>) -> String {
    let words: Vec<String> = words.collect();
    if words.is_empty() { "-".to_owned() } else { words.join(", ") }
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => cell(text),
        other => other.to_string(),
    }
}

/// A reason without the places of this one machine and its mirrors.
fn anywhere(why: &str) -> String {
    let place = |word: &str| word.starts_with('/') || word.contains("://");
    let words = why.split_whitespace().map(|word| if place(word) { "..." } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// What may stand in a cell or a footnote: one line without a bar, and not too long.
fn cell(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    match line.char_indices().nth(REASON) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kernel(name: &str, more: bool, behaviours: &Value) -> Value {
        let caps = |number| json!({ "KVM_CAP_GUEST_MEMFD": number });
        let mut types =
            vec![json!({ "type": "DEFAULT", "can_be_made": true, "capabilities": caps(0) })];
        if more {
            let kind = "SW_PROTECTED";
            types.push(json!({ "type": kind, "can_be_made": true, "capabilities": caps(1) }));
        }
        let usable = json!({
            "host": "memfd", "usable": more, "why": "tried",
            "needs": [{ "name": "kvm", "ok": more, "what": "a|b" }], "features": [],
        });
        json!({
            "kernel": name, "from": "a package", "why": null, "behaviours": behaviours,
            "doctor": {
                "machine": { "kernel": format!("{name}.1") },
                "hosts": [usable],
                "kvm": { "mmu": { "kind": "tdp" }, "hypercalls_by": null, "vm_types": types },
                "userfaultfd": { "features": if more { json!(["WP", "MOVE"]) } else { json!(["WP"]) } },
            },
        })
    }

    fn behaviour(host: &str, case: &str, result: &str, why: Option<&str>) -> Value {
        json!({ "host": host, "section": "bind", "case": case, "result": result, "why": why })
    }

    fn shown() -> String {
        let old = [
            behaviour("memfd", "a", "ok", None),
            behaviour("memfd", "b", "failed", Some("left: 1\nright: 2")),
            behaviour("new", "a", "ok", None),
        ];
        let new = [
            behaviour("memfd", "a", "ok", None),
            behaviour("memfd", "b", "ok", None),
            behaviour("new", "a", "ok", None),
        ];
        let gone = json!({ "kernel": "9.9", "from": null, "why": "no\nx http://a/b /c", "doctor": null,
            "behaviours": null });
        let (old, new) = (kernel("6.1", false, &json!(old)), kernel("lab", true, &json!(new)));
        page(&json!({ "kernels": [old, gone, new] }))
    }

    #[test]
    fn a_kernel_that_was_not_tried_is_named_with_the_reason() {
        let page = shown();
        assert!(page.contains("| 6.1 | 6.1.1 | a package | yes |"), "{page}");
        assert!(page.contains("| 9.9 | - | - | no: no x ... ... |"), "{page}");
    }

    #[test]
    fn what_differs_is_told_by_kernel_and_by_type_of_vm() {
        let page = shown();
        assert!(page.contains("| MMU | tdp | tdp |"), "{page}");
        let capability = "| `KVM_CAP_GUEST_MEMFD` | 0 | 0 on DEFAULT, 1 on SW_PROTECTED |";
        assert!(page.contains(capability), "{page}");
        assert!(page.contains("| `MOVE` | - | yes |"), "{page}");
        assert!(page.contains("| host memfd: kvm | missing[^2] | ok |"), "{page}");
        assert!(page.contains("[^2]: a\\|b\n"), "{page}");
    }

    #[test]
    fn hosts_are_those_of_the_table_and_only_what_is_not_ok_is_listed() {
        let page = shown();
        assert!(page.contains("| memfd | 1 ok, 1 failed | 2 ok |"), "{page}");
        assert!(page.contains("| bind: b | failed[^3] | ok |"), "{page}");
        assert!(page.contains("[^3]: left: 1 right: 2\n"), "{page}");
        assert!(!page.contains("| bind: a"), "{page}");
        assert!(
            page.contains("### Host new\n\nOn each kernel, 1 behaviours are ok and 0"),
            "{page}"
        );
    }

    #[test]
    fn a_reason_is_one_line_and_not_long() {
        assert_eq!(cell("a\n  b|c"), "a b\\|c");
        assert_eq!(cell(&"x".repeat(1000)).len(), REASON + 4);
    }
}
