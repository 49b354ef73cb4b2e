use std::sync::mpsc;

use super::*;
use crate::bus::BusDevice;

fn power() -> (Power, mpsc::Receiver<PowerRequest>) {
    let (told, heard) = mpsc::channel();
    let interrupt = crate::virtio::event().unwrap();
    (Power::new(interrupt, move |request| told.send(request).unwrap()), heard)
}

#[test]
fn the_button_raises_an_interrupt_and_is_seen_once() {
    let (mut power, _heard) = power();
    power.press_button();
    assert_eq!(power.interrupt().read().unwrap(), 1);
    assert_eq!(power.save().events, 1);
    let mut events = [0xff; 4];
    power.read(EVENTS, &mut events);
    assert_eq!(events, [1, 0, 0, 0]);
    power.read(EVENTS, &mut events);
    assert_eq!(events, [0; 4]);
}

#[test]
fn an_event_that_was_not_taken_comes_back_with_its_interrupt() {
    let (mut power, _heard) = power();
    power.restore(PowerState { events: 0 });
    assert!(power.interrupt().read().is_err());
    power.restore(PowerState { events: 1 });
    assert_eq!(power.interrupt().read().unwrap(), 1);
    power.raise(NEW_GENERATION);
    let mut events = [0; 4];
    power.read(EVENTS, &mut events);
    assert_eq!(events, [3, 0, 0, 0]);
}

#[test]
fn s5_and_reset_are_told_and_nothing_else_is() {
    let (mut power, heard) = power();
    for (offset, value) in
        [(SLEEP_CONTROL, 5 << 2), (SLEEP_CONTROL, 1 << 5), (RESET, 0), (SLEEP_STATUS, 0xff)]
    {
        power.write(offset, &[value]);
    }
    power.write(RESET, &[1, 1]);
    assert!(heard.try_recv().is_err());
    power.write(SLEEP_CONTROL, &[5 << 2 | 1 << 5]);
    power.write(RESET, &[1]);
    assert_eq!(heard.iter().take(2).collect::<Vec<_>>(), [PowerRequest::Off, PowerRequest::Reset]);
}
