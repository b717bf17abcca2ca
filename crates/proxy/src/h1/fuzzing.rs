//! Fuzz targets of the HTTP/1 codec. Each compares with a reading of the same bytes that is as plain as possible.

mod chunks;
mod head;
mod names;

pub use chunks::chunks;
pub use head::{request, response};
pub use names::{authority, path};
