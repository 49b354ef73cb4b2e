use std::io::Write;

use super::*;

fn said(bytes: &[u8]) -> String {
    crate::chain(&decode(bytes).unwrap_err())
}

#[test]
fn a_file_that_is_not_ours_or_not_whole_is_refused_and_says_why() {
    let sealed = seal(b"{}").unwrap();
    assert!(said(&sealed).contains("cannot be understood"), "the digest is right");
    assert!(said(b"").contains("no saved machine"));
    assert!(said(b"QEVM\0\0\0\x03 and so on").contains("no saved machine"));
    for length in 8..sealed.len() {
        assert!(said(&sealed[..length]).contains("bytes where"), "{length}");
    }
    let longer = [&sealed[..], &[0]].concat();
    assert!(said(&longer).contains("has 55 bytes where 54 should be"), "{}", said(&longer));
    let mut newer = sealed.clone();
    newer[8] = 2;
    assert!(said(&newer).contains("version 2"));
    let mut endless = sealed;
    endless[12..20].fill(0xff);
    assert!(said(&endless).contains("none has more than"));
}

#[test]
fn no_bit_can_be_flipped() {
    let sealed = seal(br#"{"memory_mib":64}"#).unwrap();
    for bit in 0..8 * sealed.len() {
        let mut flipped = sealed.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let refused = decode(&flipped).unwrap_err();
        assert!(!matches!(refused, StateError::Content(_)), "bit {bit}: {refused}");
    }
}

#[test]
fn a_file_is_read_from_its_beginning_and_a_huge_one_not_at_all() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&seal(b"{}").unwrap()).unwrap();
    assert!(matches!(read(&file), Err(StateError::Content(_))), "its position is at the end");
    file.set_len(1 << 40).unwrap();
    assert!(matches!(read(&file), Err(StateError::TooLong(_))));
    assert!(matches!(seal(&vec![0; (16 << 20) + 1]), Err(StateError::TooLong(_))));
}
