//! `[[vm]]`: the VMs, their slots, and the page tables of their guests.

use polder::Platform;
use polder::units::PageRange;
use polder_vmm::GuestRoot;

use super::table::{Parsed, Table, short, slot_number};
use super::{DEFAULT_GPA, Reader};
use crate::guest_tables::TABLES;
use crate::limits::{SLOTS_MAX, VMS_MAX};
use crate::scenario::{MemorySpec, SlotSpec, Tables, VmSpec, root_name};

impl<'t> Reader<'t> {
    pub(super) fn read_vms(&mut self, root: &Table<'t>, memory: &MemorySpec) -> Parsed<()> {
        let whole = SlotSpec { slot: 0, pages: self.all(), gpa: DEFAULT_GPA };
        for table in root.tables("vm", VMS_MAX)? {
            table.check_keys(&["name", "asid", "root", "tables", "slots"], "`[[vm]]`")?;
            let key = table.need("name", "`[[vm]]`")?;
            let name = key.text()?.to_owned();
            if self.vms.iter().any(|vm| vm.name == name) {
                return Err(key.wrong(format!("there is a VM \"{}\" already", short(&name))));
            }
            let asid = match table.get("asid") {
                None => None,
                Some(key) => {
                    let asid = u16::try_from(key.number()?).ok();
                    let asid = asid.filter(|asid| polder::machine::Asid::new(*asid).is_some());
                    Some(asid.ok_or_else(|| key.wrong("`asid` is a number from 1 to 0x3fe"))?)
                }
            };
            let slots = match table.get("slots") {
                None => vec![whole],
                Some(_) => {
                    let tables = table.tables("slots", SLOTS_MAX)?;
                    let slot = |table: &Table<'t>| {
                        table.check_keys(&["slot", "pages", "gpa"], "a slot")?;
                        self.slot(table, "a slot")
                    };
                    tables.iter().map(slot).collect::<Parsed<_>>()?
                }
            };
            let tables = self.tables(&table, asid.is_some(), memory)?;
            self.vms.push(VmSpec { name, asid, tables, slots });
        }
        if self.vms.is_empty() {
            self.vms.push(VmSpec {
                name: "vm".into(),
                asid: None,
                tables: None,
                slots: vec![whole],
            });
        }
        Ok(())
    }

    /// Where a VM's guest has page tables, and for which root.
    fn tables(
        &self,
        table: &Table<'t>,
        is_bare: bool,
        memory: &MemorySpec,
    ) -> Parsed<Option<Tables>> {
        let roots = [GuestRoot::Tdp, GuestRoot::Shadow, GuestRoot::Nested];
        let known = roots.map(|root| (root_name(root).to_owned(), root));
        let Some(key) = table.get("root") else {
            return match table.get("tables") {
                None => Ok(None),
                Some(key) => Err(key.wrong("`tables` goes with `root`")),
            };
        };
        let root = key.one_of(key.text()?, &known)?;
        if root == GuestRoot::Tdp {
            return match table.get("tables") {
                None => Ok(None),
                Some(key) => Err(key.wrong("a guest's own tables are nothing to TDP")),
            };
        }
        if is_bare || memory.platform != Platform::Plain {
            return Err(key.wrong("the tables of a guest that is protected can't be shadowed"));
        }
        if memory.owed {
            return Err(key.wrong("a guest has no tables in memory whose contents are owed"));
        }
        let tables = table.need("tables", "a VM whose `root` is not \"tdp\"")?;
        let first = tables.number()?;
        if first.checked_add(TABLES).is_none_or(|end| end > self.pages.get()) {
            let what = format!("`tables` is the first of {TABLES} pages of the memory");
            return Err(tables.wrong(what));
        }
        Ok(Some(Tables { root, first }))
    }

    fn all(&self) -> PageRange {
        PageRange::between(0, self.pages.get()).expect("memory has pages")
    }

    /// The slot that a table, which is `what`, has the keys of.
    pub(super) fn slot(&self, table: &Table<'t>, what: &str) -> Parsed<SlotSpec> {
        Ok(SlotSpec {
            slot: slot_number(&table.need("slot", what)?)?,
            pages: table.need("pages", what)?.pages()?,
            gpa: table.need("gpa", what)?.gpa()?,
        })
    }

    /// The VM that a table names, or the first.
    pub(super) fn vm(&self, table: &Table<'t>) -> Parsed<usize> {
        let known = || self.vms.iter().enumerate().map(|(at, vm)| (vm.name.clone(), at));
        match table.get("vm") {
            None => Ok(0),
            Some(key) => key.one_of(key.text()?, &known().collect::<Vec<_>>()),
        }
    }
}
