//! Gunyah's memory parcels, as far as they differ from pKVM's hypercalls: data, for who compares.
//!
//! Gunyah's resource manager moves memory between VMs by *parcels*: lists of ranges with an access
//! list (github.com/quic/gunyah-resource-manager, src/memparcel/memparcel.c; the message numbers
//! are those of Linux' drivers/virt/gunyah/rsc_mgr_rpc.c as posted). One parcel is one transfer;
//! the other side accepts it as a whole. The host's kernel has to hold the pages all the while, and
//! so asked for the same exclusive pins as pKVM's did (thread 3).

use crate::PageState;

/// How a parcel is handed over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Transfer {
    /// The other has it alone, until it is released and reclaimed.
    Lend,
    /// Both have it.
    Share,
    /// The other owns it.
    Donate,
}

/// What a transfer means, next to pKVM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Memparcel {
    /// Which.
    pub transfer: Transfer,
    /// The message to the resource manager; none that Linux sends for a donation.
    pub message: Option<u32>,
    /// What pKVM's terms would call the giver's page.
    pub giver: PageState,
    /// What they would call the other's.
    pub taker: PageState,
    /// Whether the giver stays its owner, and can reclaim it once the other has let go.
    pub reclaimable: bool,
    /// The hypercall of pKVM's that comes nearest.
    pub pkvm: &'static str,
}

/// The message by which an owner has a parcel back.
pub const MEM_RECLAIM: u32 = 0x5100_0015;

impl Memparcel {
    /// Every transfer.
    pub const ALL: [Self; 3] = [
        Self {
            transfer: Transfer::Lend,
            message: Some(0x5100_0012),
            giver: PageState::NoPage,
            taker: PageState::Owned,
            reclaimable: true,
            pkvm: "__pkvm_host_donate_guest(), and reclaiming",
        },
        Self {
            transfer: Transfer::Share,
            message: Some(0x5100_0013),
            giver: PageState::SharedOwned,
            taker: PageState::SharedBorrowed,
            reclaimable: true,
            pkvm: "__pkvm_host_share_guest()",
        },
        Self {
            transfer: Transfer::Donate,
            message: None,
            giver: PageState::NoPage,
            taker: PageState::Owned,
            reclaimable: false,
            pkvm: "__pkvm_host_donate_hyp()",
        },
    ];
}
