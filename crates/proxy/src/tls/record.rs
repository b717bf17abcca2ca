//! Records of TLS 1.3 once its keys are agreed on (RFC 8446, section 5).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, InvalidMessage};

/// The length of a record's header.
pub(super) const HEADER: usize = 5;

/// The length of the tag of every cipher there is.
const TAG: usize = 16;

/// The most content that a record carries.
pub(super) const MOST_CONTENT: usize = 1 << 14;

/// The longest record: content, its type, padding and tag take at most 256 bytes more than the most content.
pub(super) const LONGEST: usize = HEADER + MOST_CONTENT + 256;

/// What a record adds to its content.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;

/// What a sealed record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Alert,
    Handshake,
    Data,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Kind::Alert => 21,
            Kind::Handshake => 22,
            Kind::Data => DATA,
        }
    }

    fn of(code: u8) -> Option<Kind> {
        [Kind::Alert, Kind::Handshake, Kind::Data].into_iter().find(|kind| kind.code() == code)
    }
}

/// What every sealed record looks like from outside.
const DATA: u8 = 23;

/// Why a connection cannot go on, and what the peer is told of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) error: Error,
    /// Nothing when it is the peer who ended the connection.
    pub(super) alert: Option<AlertDescription>,
}

impl Fault {
    /// Something that does not belong where it came.
    pub(super) fn unexpected() -> Self {
        let error = Error::General("a message that does not belong here".into());
        Self { error, alert: Some(AlertDescription::UnexpectedMessage) }
    }

    /// Something that has not the form it must have.
    pub(super) fn malformed() -> Self {
        let error = Error::InvalidMessage(InvalidMessage::InvalidContentType);
        Self { error, alert: Some(AlertDescription::DecodeError) }
    }

    fn overflow() -> Self {
        Self { error: Error::PeerSentOversizedRecord, alert: Some(AlertDescription::RecordOverflow) }
    }

    fn undecipherable() -> Self {
        Self { error: Error::DecryptError, alert: Some(AlertDescription::BadRecordMac) }
    }
}

/// The length of the record that `bytes` begin with, when all of it is there.
pub(super) fn whole(bytes: &[u8]) -> Result<Option<usize>, Fault> {
    let &[kind, major, _, high, low, ..] = bytes else { return Ok(None) };
    if major != 3 || !(20..=23).contains(&kind) {
        return Err(Fault::malformed());
    }
    let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
    if length > LONGEST {
        return Err(Fault::overflow());
    }
    Ok((bytes.len() >= length).then_some(length))
}

/// One direction's key, and which record is next.
struct Key {
    key: LessSafeKey,
    iv: [u8; 12],
    next: u64,
}

impl Key {
    fn new((next, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that is none of the mesh's".into())),
        };
        let unusable = || Error::General("the handshake made keys of a wrong length".into());
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable())?);
        Ok(Self { key, iv: iv.as_ref().try_into().map_err(|_| unusable())?, next })
    }

    /// The nonce of the next record (section 5.3). None is used twice: the key goes long before the numbers end.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.next.to_be_bytes()) {
            *byte ^= number;
        }
        self.next += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// The header of a sealed record, which is authenticated too.
fn header(sealed: usize) -> [u8; HEADER] {
    let [.., high, low] = sealed.to_be_bytes();
    [DATA, 3, 3, high, low]
}

/// Seals what is sent.
pub(super) struct Sealer(Key);

impl Sealer {
    /// With these keys, beginning at this record.
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Key::new(secrets).map(Self)
    }

    /// How many records the key has sealed.
    pub(super) fn sealed(&self) -> u64 {
        self.0.next
    }

    /// Writes one record of this content, at most [`MOST_CONTENT`] bytes, to the front of `out` and says how long it is.
    ///
    /// # Errors
    /// `out` is shorter than the content and [`OVERHEAD`].
    pub(super) fn seal(&mut self, kind: Kind, content: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let nonce = self.0.nonce();
        let Frame { head, front, content: sealed, rest } = Frame::of(content.len(), out)?;
        front.copy_from_slice(&head);
        self.0
            .key
            .seal_out_of_place_scatter(nonce, Aad::from(head), content, sealed, &[kind.code()], rest)
            .map_err(|_| Error::EncryptError)?;
        Ok(content.len() + OVERHEAD)
    }

    /// The same of so many bytes of data that lie in `out` already, behind [`HEADER`].
    ///
    /// # Errors
    /// As of [`Sealer::seal`].
    pub(super) fn seal_in_place(&mut self, content: usize, out: &mut [u8]) -> Result<usize, Error> {
        let nonce = self.0.nonce();
        let Frame { head, front, content: sealed, rest } = Frame::of(content, out)?;
        front.copy_from_slice(&head);
        self.0
            .key
            .seal_in_place_scatter(nonce, Aad::from(head), sealed, &[Kind::Data.code()], rest)
            .map_err(|_| Error::EncryptError)?;
        Ok(content + OVERHEAD)
    }
}

/// The places of a record that is to be written.
struct Frame<'a> {
    head: [u8; HEADER],
    front: &'a mut [u8],
    content: &'a mut [u8],
    /// The content's type and the tag.
    rest: &'a mut [u8],
}

impl<'a> Frame<'a> {
    fn of(content: usize, out: &'a mut [u8]) -> Result<Self, Error> {
        let (front, sealed) = out.get_mut(..content + OVERHEAD).ok_or(Error::EncryptError)?.split_at_mut(HEADER);
        let head = header(sealed.len());
        let (content, rest) = sealed.split_at_mut(content);
        Ok(Self { head, front, content, rest })
    }
}

/// Opens what is received.
pub(super) struct Opener(Key);

impl Opener {
    /// With these keys, beginning at this record.
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Key::new(secrets).map(Self)
    }

    /// How long `out` must be for a [`whole`] record of this length.
    pub(super) const fn room(record: usize) -> usize {
        record.saturating_sub(HEADER + TAG)
    }

    /// Opens a [`whole`] record into `out`, which has the [`Opener::room`] for it, and says what it carries and how much of
    /// `out` that is.
    ///
    /// # Errors
    /// It was not sealed with this key as this record, or what is in it is none of what TLS seals.
    pub(super) fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<(Kind, usize), Fault> {
        let (head, sealed) = record.split_at_checked(HEADER).ok_or_else(Fault::malformed)?;
        if head.first() != Some(&DATA) {
            // After the handshake all is sealed.
            return Err(Fault::unexpected());
        }
        let content = sealed.len().checked_sub(TAG).ok_or_else(Fault::undecipherable)?;
        let (sealed, tag) = sealed.split_at(content);
        let out = out.get_mut(..content).ok_or_else(Fault::malformed)?;
        let nonce = self.0.nonce();
        let opened = self.0.key.open_separate_gather(nonce, Aad::from(head), sealed, tag, out);
        opened.map_err(|_| Fault::undecipherable())?;
        content_of(out)
    }

    /// The same without another place: the content is at the front of what is behind the record's [`HEADER`].
    ///
    /// # Errors
    /// As of [`Opener::open`].
    pub(super) fn open_in_place(&mut self, record: &mut [u8]) -> Result<(Kind, usize), Fault> {
        let (head, sealed) = record.split_at_mut_checked(HEADER).ok_or_else(Fault::malformed)?;
        if head.first() != Some(&DATA) {
            return Err(Fault::unexpected());
        }
        let nonce = self.0.nonce();
        let opened = self.0.key.open_in_place(nonce, Aad::from(head), sealed);
        content_of(opened.map_err(|_| Fault::undecipherable())?)
    }
}

/// What an opened record carries, and how long that is: behind it are its type, which is not zero, and zeros (section 5.4).
fn content_of(opened: &[u8]) -> Result<(Kind, usize), Fault> {
    let last = opened.iter().rposition(|byte| *byte != 0).ok_or_else(Fault::unexpected)?;
    let kind = opened.get(last).copied().and_then(Kind::of).ok_or_else(Fault::unexpected)?;
    if last > MOST_CONTENT {
        return Err(Fault::overflow());
    }
    Ok((kind, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_taken_off_and_must_hide_something() {
        assert_eq!(content_of(b"abc\x17\0\0"), Ok((Kind::Data, 3)));
        assert_eq!(content_of(b"a\0\x16"), Ok((Kind::Handshake, 2)));
        assert_eq!(content_of(&[21]), Ok((Kind::Alert, 0)));
        for nothing in [&[][..], &[0; 5], b"abc", b"abc\x14", b"abc\x18\0"] {
            assert_eq!(content_of(nothing), Err(Fault::unexpected()), "{nothing:?}");
        }
        let mut long = vec![1; MOST_CONTENT + 1];
        long.push(Kind::Data.code());
        assert_eq!(content_of(&long), Err(Fault::overflow()));
        assert_eq!(content_of(&long[1..]), Ok((Kind::Data, MOST_CONTENT)));
    }

    #[test]
    fn a_record_is_as_long_as_its_header_says() {
        assert_eq!(whole(&[]), Ok(None));
        assert_eq!(whole(&[23, 3, 3, 0]), Ok(None));
        assert_eq!(whole(&[23, 3, 3, 0, 2, 1]), Ok(None));
        assert_eq!(whole(&[22, 3, 1, 0, 2, 1, 2, 3]), Ok(Some(7)));
        assert_eq!(whole(&[23, 3, 3, 0x41, 0]), Ok(None));
        assert_eq!(whole(&[23, 3, 3, 0x41, 1]), Err(Fault::overflow()));
        for other in [[19, 3, 3, 0, 1], [24, 3, 3, 0, 1], [23, 2, 3, 0, 1]] {
            assert_eq!(whole(&other), Err(Fault::malformed()));
        }
    }
}
