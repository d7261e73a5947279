//! Differential testing: random programs, played on two hosts that have to agree.
//!
//! | word | is |
//! |---|---|
//! | program | a random [`Scenario`](polder_play::Scenario) that says nothing of what is expected ([`program()`]) |
//! | side | a host on which it is played ([`Side`]) |
//! | difference | the first step that comes to something else, or what is so at the end ([`compare`]) |
//!
//! A program is recorded on the first host: what came of each step is what is expected of it. On
//! the others it is played as any scenario is. So a difference is a scenario that passes on one
//! host and fails on another; it is made as small as it goes ([`shrink`]) and saved ([`save`]), for
//! `polder play`. `docs/differential.md` tells what is compared.
//!
//! # Holes
//! What only one host offers is no part of a program: [`LEFT_OUT`] names it. Two actors never wait
//! at once, for who of them goes first is chance.

mod compare;
mod left_out;
mod program;
mod random;
mod report;
mod shrink;

pub use compare::{Came, Difference, Side, compare};
pub use left_out::{Feature, LEFT_OUT, LeftOut};
pub use program::program;
pub use report::{save, side_by_side, to_save};
pub use shrink::shrink;
