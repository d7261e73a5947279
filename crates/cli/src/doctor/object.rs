//! The findings as one JSON object. A key is always there; its value is null where it is not known.

use serde_json::{Map, Value, json};

use super::facts::{Facts, Mmu};
use super::follow::{self, HostFindings};
use super::machine::{Limits, Machine};
use super::parse::Limit;
use polder_vmm::doctor::{KvmOffer, VmTypeOffer, Way};
use polder_vmm::guest::Transport;

pub(super) fn of(facts: &Facts, hosts: &[HostFindings]) -> Value {
    let machine = &facts.machine;
    json!({
        "can_run": {
            "host": if facts.memfd.is_ok() { "memfd" } else { "machine" },
            "accelerator": if facts.memfd.is_ok() { "kvm" } else { "machine" },
        },
        "hosts": hosts,
        "machine": {
            "kernel": machine.kernel,
            "cpu": machine.cpu,
            "memory_bytes": machine.limits.memory_total,
            "memory_available_bytes": machine.limits.memory_available,
            "memory_free_bytes": machine.limits.memory_free,
            "unread": machine.unread,
        },
        "kvm": kvm(facts),
        "userfaultfd": userfaultfd(facts),
        "huge_pages": huge_pages(machine),
        "shmem_thp": {
            "all": machine.shmem,
            "sizes": machine.shmem_sizes.iter()
                .map(|(bytes, choice)| json!({ "bytes": bytes, "choice": choice }))
                .collect::<Vec<_>>(),
        },
        "limits": limits(&machine.limits),
    })
}

fn kvm(facts: &Facts) -> Value {
    let offer = facts.kvm.as_ref();
    let (mmu, because) = Mmu::of(facts);
    let types = offer.map(|kvm| kvm.types.iter().map(vm_type).collect::<Vec<_>>());
    json!({
        "opens": offer.is_ok(),
        "why": offer.err().map(|error| follow::chain(error)),
        "api_version": offer.ok().map(|kvm| kvm.api_version),
        "mmu": { "kind": mmu.name(), "because": because },
        "hypercalls_by": offer.ok().and_then(hypercalls_by),
        "vm_types": types.unwrap_or_default(),
    })
}

/// `none` is found out; null is not.
fn hypercalls_by(kvm: &KvmOffer) -> Option<&'static str> {
    Some(match kvm.hypercalls.as_ref().ok()? {
        Transport::Port => "none",
        Transport::Vmcall => "vmcall",
        Transport::Vmmcall => "vmmcall",
    })
}

fn vm_type(of: &VmTypeOffer) -> Value {
    let values = of.capabilities.iter().flatten();
    let capabilities: Map<String, Value> =
        values.map(|(name, value)| (format!("KVM_CAP_{name}"), json!(value))).collect();
    json!({
        "type": of.name(),
        "number": of.number,
        "can_be_made": of.capabilities.is_ok(),
        "why": of.capabilities.as_ref().err().map(ToString::to_string),
        "capabilities": capabilities,
    })
}

fn userfaultfd(facts: &Facts) -> Value {
    let watch = facts.userfault.as_ref();
    let way = watch.and_then(|watch| watch.way.as_ref());
    let features = watch.map(|watch| watch.features.as_slice());
    json!({
        "permitted": way.is_ok(),
        "by": way.ok().map(|way| match way {
            Way::Device => "/dev/userfaultfd",
            Way::SystemCall => "system call",
        }),
        "why": way.err().map(ToString::to_string),
        "unprivileged_sysctl": facts.machine.unprivileged_userfaultfd,
        "features": features.unwrap_or_default(),
        "features_without_name": watch.map_or(0, |watch| watch.nameless),
    })
}

fn huge_pages(machine: &Machine) -> Vec<Value> {
    let pool = |pool: &super::machine::Pool| {
        json!({
            "bytes": pool.bytes,
            "total": pool.total,
            "free": pool.free,
            "reserved": pool.reserved,
        })
    };
    machine.huge_pages.iter().map(pool).collect()
}

fn limits(limits: &Limits) -> Value {
    json!({
        "address_space": limit(limits.address_space),
        "locked_memory": limit(limits.locked_memory),
        "open_files": limit(limits.open_files),
        "max_map_count": limits.max_map_count,
    })
}

/// A number, or `"unlimited"`.
fn limit(limit: Option<Limit>) -> Value {
    match limit {
        None => Value::Null,
        Some(Limit::Unlimited) => "unlimited".into(),
        Some(Limit::At(bound)) => bound.into(),
    }
}
