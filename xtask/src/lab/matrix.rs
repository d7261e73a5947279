//! `cargo xtask lab --matrix`: the behaviour table and `polder doctor` in one kernel after the
//! other, and the page that tells what came of it.

use std::ffi::OsString;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::guest::Kernel;
use super::kernels_page::page;
use super::packaged::PACKAGED;
use super::table::HOSTS;
use super::{Lab, holding, kernel, tool};

/// Seconds that a cell may take: on an older kernel one may hang for a bug of that kernel.
const LIMIT: &str = "60";

/// 0 once the page is written, whatever it tells. It is left where there is nothing to tell.
pub(super) fn run(lab: &Lab) -> Result<u8, String> {
    lab.build()?;
    let kernels = lab.folder().join("kernels");
    tool::make_folder(&kernels)?;
    let _alone = tool::alone(&kernels.join("lock"), "the kernels")?;
    let mut came = Vec::new();
    for packaged in &PACKAGED {
        let kernel = packaged.kernel(&kernels);
        came.push(looked(lab, packaged.series, kernel)?);
    }
    let from = match kernel::given() {
        // Where it lies is of this machine, and its name says most.
        Some(given) => given.file_name().unwrap_or_default().display().to_string(),
        None => "built with xtask/lab/config-fragment".to_owned(),
    };
    came.push(looked(lab, "lab", lab.kernel().map(|kernel| (kernel, from)))?);
    if came.iter().all(|kernel| kernel["doctor"].is_null()) {
        return Err("no kernel could be tried; docs/kernels.md is left as it was".to_owned());
    }
    let came = json!({ "kernels": came });
    tool::write(&lab.root.join("docs/kernels.md"), page(&came))?;
    eprintln!("lab: docs/kernels.md is written");
    if lab.arguments.json {
        println!("{came}");
    }
    Ok(0)
}

/// What came of a kernel. That it could not be had, or did not live, is an answer too.
fn looked(
    lab: &Lab,
    name: &str,
    kernel: Result<(Kernel, String), String>,
) -> Result<Value, String> {
    let (mut doctor, mut behaviours) = (Value::Null, Value::Null);
    let (from, came) = match kernel {
        Ok((kernel, from)) => (Some(from), tried(lab, name, &kernel, &mut doctor, &mut behaviours)),
        Err(why) => (None, Err(why)),
    };
    if let Err(why) = &came {
        // Whatever it was that failed of it.
        if tool::interrupted()?.load(Ordering::Relaxed) {
            return Err(tool::INTERRUPTED.to_owned());
        }
        eprintln!("lab: {name}: {why}");
    }
    Ok(json!({
        "kernel": name,
        "from": from,
        "doctor": doctor,
        "behaviours": behaviours,
        "why": came.err().and_then(|why| why.lines().next().map(str::to_owned)),
    }))
}

/// Runs the doctor, then the table, for as long as the kernel lives.
fn tried(
    lab: &Lab,
    name: &str,
    kernel: &Kernel,
    doctor: &mut Value,
    behaviours: &mut Value,
) -> Result<(), String> {
    let command = [lab.program("polder"), "doctor".into(), "--json".into()];
    *doctor = told(lab, name, "polder doctor", kernel, &command)?;
    // What is missing is to be said, and no failure.
    let this = std::env::current_exe().map_err(|why| format!("this program: {why}"))?;
    let table = [
        this.into_os_string(),
        holding::NAME.into(),
        "env".into(),
        "POLDER_REQUIRE=".into(),
        lab.program("polder-behaviour"),
        "--host".into(),
        HOSTS.into(),
        "--page-size".into(),
        "4k".into(),
        "--limit".into(),
        LIMIT.into(),
        "--json".into(),
    ];
    *behaviours = told(lab, name, "the behaviour table", kernel, &table)?["behaviours"].take();
    Ok(())
}

/// Runs a command that writes JSON, and whose exit status says no more than that does.
fn told(
    lab: &Lab,
    name: &str,
    what: &str,
    kernel: &Kernel,
    command: &[OsString],
) -> Result<Value, String> {
    let whose = format!("{name}: {what}");
    eprintln!("lab: {whose}");
    let mut text = Vec::new();
    let status = lab.run(kernel, Some(&whose), command, &mut |bytes| text.extend(bytes))?;
    serde_json::from_slice(&text)
        .map_err(|why| format!("{what} wrote no JSON (exit status {status}): {why}"))
}
