use super::*;
use crate::bus::BusDevice;

#[test]
fn only_the_reset_command_at_the_command_port_resets() {
    let (tell, resets) = std::sync::mpsc::channel();
    let mut device = I8042::new(move || tell.send(()).unwrap());
    device.write(0, &[0xfe]);
    device.write(4, &[0xd1]);
    device.write(4, &[0xfe, 0xfe]);
    assert!(resets.try_recv().is_err());
    device.write(4, &[0xfe]);
    resets.try_recv().unwrap();
}

#[test]
fn linux_finds_no_controller_soon_and_does_not_wait_before_a_reset() {
    let mut device = I8042::new(|| ());
    let mut read = |offset| {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    };
    // `i8042_flush` gives up when there is more to read than the buffer of a controller holds.
    for _ in 0..=16 {
        assert_eq!(read(4) & 1, 1);
        read(0);
    }
    // `kb_wait`.
    assert_eq!(read(4) & 2, 0);
    // Ports between are nobody's.
    assert_eq!(read(1), 0xff);
}
