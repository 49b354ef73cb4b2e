use std::time::{SystemTime, UNIX_EPOCH};

use super::clock::Moment;
use super::*;
use crate::bus::BusDevice;

fn read(rtc: &mut Rtc, register: u8) -> u8 {
    rtc.write(0, &[register | 0x80]);
    let mut data = [0xff];
    rtc.read(1, &mut data);
    data[0]
}

fn decimal(bcd: u8) -> u8 {
    (bcd >> 4) * 10 + (bcd & 15)
}

#[test]
fn moments_are_right_over_leap_years_and_centuries() {
    let show = |seconds| {
        let m = Moment::from_unix(seconds);
        let year = u32::from(m.century) * 100 + u32::from(m.year);
        (
            format!("{year}-{:02}-{:02} {:02}:{:02}:{:02}", m.month, m.day, m.hour, m.minute, m.second),
            m.weekday,
        )
    };
    // By date(1).
    assert_eq!(show(0), ("1970-01-01 00:00:00".into(), 5));
    assert_eq!(show(951_827_696), ("2000-02-29 12:34:56".into(), 3));
    assert_eq!(show(1_709_251_199), ("2024-02-29 23:59:59".into(), 5));
    assert_eq!(show(4_107_542_400), ("2100-03-01 00:00:00".into(), 2));
    assert_eq!(show(u64::MAX), ("9999-12-31 23:59:59".into(), 6));
}

#[test]
fn a_driver_reads_the_hosts_time_and_a_valid_clock() {
    let mut rtc = Rtc::new(RtcState::default());
    assert_eq!([0x0a, 0x0b, 0x0c, 0x0d].map(|register| read(&mut rtc, register)), [0x26, 0x02, 0, 0x80]);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let before = now();
    let [second, minute, hour, weekday, day, month, year, century] =
        [0, 2, 4, 6, 7, 8, 9, 0x32].map(|register| decimal(read(&mut rtc, register)));
    let read = Moment { second, minute, hour, weekday, day, month, year, century };
    assert!((before..=now()).any(|seconds| Moment::from_unix(seconds) == read), "{read:?}");
}

#[test]
fn the_guest_cannot_set_it() {
    let mut rtc = Rtc::new(RtcState::default());
    for register in 0..=0x7f {
        rtc.write(0, &[register]);
        rtc.write(1, &[0x99]);
    }
    assert_eq!([0x0b, 0x0d].map(|register| read(&mut rtc, register)), [0x02, 0x80]);
    assert_ne!(read(&mut rtc, 0), 0x99);
    assert_eq!(Rtc::new(rtc.save()).save(), RtcState { index: 0 });
}
