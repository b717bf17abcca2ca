//! The fault plan: each fault is made, and what must hold is measured. Rows that other scenarios of this directory show are
//! not repeated here. `make test` runs the short forms; `make faults` the long ones, and writes docs/reliability.md.

mod away;
mod dying;
mod flood;
mod leaving;
mod names;
mod replaced;
mod sick;
mod silent;
mod site;
mod stored;
mod streams;
