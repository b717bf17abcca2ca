//! Fuzz targets of the HTTP/2 codec.

mod conversation;
mod fields;

pub use conversation::conversation;
pub use fields::fields;
pub(crate) use fields::request_of;
