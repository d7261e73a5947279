//! An [`Explanation`] in words.

use std::fmt::{self, Write};

use polder_engine::{Population, Visibility};

use super::{BindingFacts, Explanation, HostState, MappingLimit, PastOperation};

impl fmt::Display for MappingLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at most", self.level)?;
        match (&self.clause, &self.why) {
            (Some(clause), Some(why)) => write!(f, " ({clause}: {why})"),
            _ => Ok(()),
        }
    }
}

impl Explanation {
    /// What keeps a device model from touching it now, in a sentence; nothing, if it may.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let why = memory.explain(5u32.into())?.host_access();
    /// assert_eq!(why.as_deref(), Some("it is private to the guest"));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn host_access(&self) -> Option<String> {
        let granted = (self.granted == Visibility::Private.to_string())
            .then(|| "it is private to the guest".to_owned());
        let owed = (self.population == Population::Owed.to_string())
            .then(|| "its contents have not arrived".to_owned());
        let quarantined = self.quarantined.then(|| "it is in quarantine".to_owned());
        let failed = self.source_failed.then(|| "its contents could not be brought".to_owned());
        let claim = self.claim.as_ref().map(|claim| format!("a {} holds it", claim.by));
        quarantined.or(granted).or(failed).or(owed).or(claim)
    }

    /// What keeps it from becoming private, or from being discarded, now.
    ///
    /// ```
    /// # use polder::{Holder, HostKind, Memory, PinKind, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// let _pin = memory.pin(page, PinKind::LongTerm, Holder::new("vfio"))?;
    /// assert!(memory.explain(3u32.into())?.in_use().unwrap().contains("vfio"));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn in_use(&self) -> Option<String> {
        if let Some(pin) = self.pins.first() {
            return Some(format!("it is pinned ({}) by {}", pin.kind, pin.holder));
        }
        self.host.references.first().map(|who| format!("{who} refers to it"))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, offset, host, .. } = self;
        writeln!(f, "page {page:#x} (offset {offset:#x}), on host {}", host.name)?;
        let lines = self.state().chain(self.seen_by()).chain(self.backed_by());
        lines.chain(self.held_by()).try_for_each(|(name, text)| writeln!(f, "  {name:<11} {text}"))
    }
}

/// A line that is told: its name, and what it says.
type Line = (String, String);

fn line(name: &str, text: impl Into<String>) -> Line {
    (name.to_owned(), text.into())
}

impl Explanation {
    /// What it is, and what that means for who wants something of it.
    fn state(&self) -> impl Iterator<Item = Line> {
        let mut state = format!("{}, {}", self.granted, self.population);
        for (is, word) in [
            (self.source_failed, ", its source failed"),
            (self.quarantined, ", IN QUARANTINE: out of use for good"),
        ] {
            state.push_str(if is { word } else { "" });
        }
        let access = match self.host_access() {
            Some(why) => format!("refused: {why}"),
            None => "allowed".to_owned(),
        };
        let conversion = match self.in_use() {
            Some(why) => format!("to private is refused: {why}"),
            None => "nothing that Polder knows of is in the way".to_owned(),
        };
        [line("state", state), line("host access", access), line("conversion", conversion)]
            .into_iter()
    }

    /// Who sees it, and how large at most.
    fn seen_by(&self) -> impl Iterator<Item = Line> {
        let bindings = self.bindings.iter().map(|binding| {
            let BindingFacts { slot, gpa, wanted, limit, .. } = binding;
            let mut text = format!("slot {slot} at gpa {gpa:#x}; wants {wanted}; {limit}");
            if binding.wanted != self.granted {
                text.push_str("; its wish is unmet");
            }
            if let Some(level) = &binding.mapped_at {
                let _ = write!(text, "; stage 2 has it at {level}");
            }
            line(&format!("VM {}", binding.vm), text)
        });
        let nobody = self.bindings.is_empty().then(|| line("VM", "no VM sees it"));
        let denied = match self.denied_in.is_empty() {
            true => String::new(),
            false => {
                format!("; a marker denies it in the {} view", self.denied_in.join(" and the "))
            }
        };
        let host_view = line("host view", format!("{}{denied}", self.host_view));
        bindings.chain(nobody).chain([host_view])
    }

    /// What the host has of it.
    fn backed_by(&self) -> impl Iterator<Item = Line> {
        let HostState { memory, folio, rmp, references, .. } = &self.host;
        let mut text = if *memory { "yes" } else { "none yet" }.to_owned();
        if let Some(folio) = folio {
            let _ = write!(text, ", in a folio of {folio}");
        }
        let rmp = rmp.iter().map(|rmp| {
            let validated = if rmp.validated { "validated" } else { "not validated" };
            let text = match rmp.assigned {
                true => format!("assigned, {}, gfn {:#x}, {validated}", rmp.level, rmp.gfn),
                false => "not assigned".to_owned(),
            };
            line("rmp entry", text)
        });
        let references = references.iter().map(|who| line("reference", who.as_str()));
        [line("memory", text)].into_iter().chain(rmp).chain(references)
    }

    /// Who holds it now, and who did.
    fn held_by(&self) -> impl Iterator<Item = Line> {
        let claim = self.claim.iter().map(|claim| {
            let how = match (claim.abandoned, claim.undoing) {
                (true, _) => ", abandoned: the next who meets it undoes it",
                (false, true) => ", being undone",
                (false, false) => "",
            };
            line("claim", format!("{} of pages {}{how}", claim.by, claim.pages))
        });
        let in_flight = (self.in_flight > 0)
            .then(|| line("in flight", format!("{} answers and copies", self.in_flight)));
        let pins = self.pins.iter().map(|pin| {
            line("pin", format!("{}, by {}, of pages {}", pin.kind, pin.holder, pin.pages))
        });
        let past = self.last_operations.iter().map(|past| {
            let PastOperation { sequence, did, pages, came, why } = past;
            let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            line("last", format!("#{sequence} {did} of pages {pages}: {came}{why}"))
        });
        claim.chain(in_flight).chain(pins).chain(past)
    }
}
