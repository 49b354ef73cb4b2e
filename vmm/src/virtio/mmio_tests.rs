use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::{ActivateError, Counters, RestoreError, read_config_bytes};

#[derive(Debug, Default)]
struct Probe {
    counters: Counters,
    active: Option<Activation>,
    resets: u32,
    config: [u8; 4],
}

impl VirtioDevice for Probe {
    type State = [u8; 4];
    const TYPE: u32 = 4;

    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(byte) = self.config.get_mut(usize::try_from(offset).unwrap()) {
            *byte = data[0];
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !activation.queues[0].is_usable() {
            return Err(ActivateError::NoQueue(0));
        }
        self.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.active = None;
        self.resets += 1;
    }
    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().flat_map(|active| &active.queues).map(Virtqueue::state).collect()
    }
    fn save(&self) -> Self::State {
        self.config
    }
    fn restore(&mut self, state: &[u8; 4]) -> Result<(), RestoreError> {
        self.config = *state;
        RestoreError::unless_same("first byte", &state[0], &0)
    }
    fn counters(&self) -> &Counters {
        &self.counters
    }
}

fn transport() -> Transport<Probe> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    Transport::new(Probe::default(), Arc::new(memory)).unwrap()
}

fn read(transport: &mut Transport<Probe>, offset: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut Transport<Probe>, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// As a driver does it (virtio 1.2, section 3.1.1), the first queue's rings at `ring`.
fn drive(transport: &mut Transport<Probe>, features: u64, ring: u32) {
    for status in [1, 3] {
        write(transport, 0x70, status);
    }
    for (select, value) in [(0, features), (1, features >> 32)] {
        write(transport, 0x24, select);
        write(transport, 0x20, (value & 0xffff_ffff) as u32);
    }
    write(transport, 0x70, 11);
    write(transport, 0x30, 0);
    write(transport, 0x38, 8);
    for (register, address) in [(0x80, ring), (0x90, ring + 0x1000), (0xa0, ring + 0x2000)] {
        write(transport, register, address);
        write(transport, register + 4, 0);
    }
    write(transport, 0x44, 1);
    write(transport, 0x70, 15);
}

#[test]
fn a_driver_finds_the_device_and_makes_it_work() {
    let mut transport = transport();
    assert_eq!([0, 4, 8].map(|offset| read(&mut transport, offset)), [MAGIC, 2, 4]);
    assert_eq!(read(&mut transport, 0x34), 16);
    drive(&mut transport, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | 1 << 5, 0x1000);
    assert_eq!(read(&mut transport, 0x70), 15);
    let active = transport.device().active.as_ref().unwrap();
    let state = active.queues[0].state();
    assert_eq!((state.size, state.desc_table, state.event_idx_enabled), (8, 0x1000, true));
    assert!(!active.queues[1].is_usable());
    write(&mut transport, 0x50, 0);
    assert!(transport.device().active.as_ref().unwrap().queues[0].take_kick());
}

#[test]
fn features_that_were_not_offered_are_not_taken() {
    for features in [VIRTIO_F_VERSION_1 | 1 << 6, 1 << 5] {
        let mut transport = transport();
        drive(&mut transport, features, 0x1000);
        assert_eq!(read(&mut transport, 0x70) & status::FEATURES_OK, 0);
        assert!(transport.device().active.is_none());
    }
}

#[test]
fn a_ring_outside_memory_makes_the_device_ask_for_a_reset() {
    let mut transport = transport();
    drive(&mut transport, VIRTIO_F_VERSION_1, 0xffff_0000);
    assert_eq!(read(&mut transport, 0x70) & status::NEEDS_RESET, status::NEEDS_RESET);
    assert_eq!(read(&mut transport, 0x60), 2);
    write(&mut transport, 0x70, 0);
    assert_eq!((read(&mut transport, 0x70), read(&mut transport, 0x60)), (0, 0));
    drive(&mut transport, VIRTIO_F_VERSION_1, 0x1000);
    assert!(transport.device().active.is_some());
}

#[test]
fn an_active_queue_cannot_be_moved_and_a_reset_gives_it_up() {
    let mut transport = transport();
    drive(&mut transport, VIRTIO_F_VERSION_1, 0x1000);
    write(&mut transport, 0x80, 0x8000);
    write(&mut transport, 0x44, 0);
    assert_eq!(transport.save().queues[0].desc_table, 0x1000);
    write(&mut transport, 0x70, 0);
    assert_eq!(transport.device().resets, 1);
    assert!(!transport.save().queues[0].ready);
}

#[test]
fn configuration_is_read_in_any_width_and_written_by_a_driver_only() {
    let mut transport = transport();
    transport.write(CONFIG + 2, &[9]);
    write(&mut transport, 0x70, 3);
    transport.write(CONFIG + 1, &[7]);
    let mut data = [1; 8];
    transport.read(CONFIG, &mut data);
    assert_eq!(data, [0, 7, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn registers_bear_any_access() {
    let mut transport = transport();
    for offset in 0..0x200 {
        for length in [1, 2, 4, 8] {
            transport.write(offset, &vec![0xff; length][..]);
            transport.read(offset, &mut vec![0; length][..]);
        }
    }
    assert_eq!(read(&mut transport, 0), MAGIC);
}

#[test]
fn what_is_saved_is_plain_data() {
    let mut transport = transport();
    drive(&mut transport, VIRTIO_F_VERSION_1 | 1 << 5, 0x1000);
    transport.interrupt().used_buffer();
    let state = transport.save();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<TransportState<[u8; 4]>>(&text).unwrap(), state);
    assert_eq!((state.interrupt_status, state.queues[0].ready, state.queues[1].ready), (1, true, false));
}

fn saved() -> TransportState<[u8; 4]> {
    let mut transport = transport();
    drive(&mut transport, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | 1 << 5, 0x1000);
    transport.write(CONFIG + 1, &[7]);
    transport.save()
}

#[test]
fn a_device_goes_on_where_it_was_saved_and_is_kicked_once() {
    let state = saved();
    let mut transport = transport();
    transport.restore(&state).unwrap();
    assert_eq!(transport.save(), state);
    assert!(transport.interrupt().event().read().is_err(), "nothing to tell");
    let active = transport.device().active.as_ref().unwrap();
    assert!(active.queues[0].take_kick() && !active.queues[0].take_kick());
    assert!(!active.queues[1].take_kick(), "it is not ready");
    assert_eq!(active.features, state.features);
    assert_eq!(read(&mut transport, 0x70), 15);
    write(&mut transport, 0x70, 0);
    assert!(transport.device().active.is_none());
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again() {
    let transport = transport();
    transport.interrupt().used_buffer();
    transport.interrupt().event().read().unwrap();
    let state = transport.save();
    let mut other = self::transport();
    other.restore(&state).unwrap();
    assert_eq!((other.interrupt().status(), other.interrupt().event().read().unwrap()), (1, 1));
}

#[test]
fn a_device_that_had_given_up_waits_for_its_reset() {
    let mut transport = transport();
    drive(&mut transport, VIRTIO_F_VERSION_1, 0xffff_0000);
    let state = transport.save();
    assert!(state.needs_reset);
    let mut other = self::transport();
    other.restore(&state).unwrap();
    assert!(other.device().active.is_none());
    assert_eq!(read(&mut other, 0x70) & status::NEEDS_RESET, status::NEEDS_RESET);
    assert_eq!(other.save(), state);
    write(&mut other, 0x70, 0);
    drive(&mut other, VIRTIO_F_VERSION_1, 0x1000);
    assert!(other.device().active.is_some());
}

#[test]
fn what_no_driver_could_have_set_up_is_refused() {
    type Change = fn(&mut TransportState<[u8; 4]>);
    let changes: [(&str, Change); 10] = [
        ("status", |state| state.status |= 1 << 8),
        ("status", |state| state.status |= status::NEEDS_RESET),
        ("settled features", |state| state.status &= !status::FEATURES_OK),
        ("features", |state| state.features |= 1 << 6),
        ("features", |state| state.features &= !VIRTIO_F_VERSION_1),
        ("number of queues", |state| state.queues.truncate(1)),
        ("longest queue", |state| state.queues[1].max_size = 16),
        ("queue 0", |state| state.queues[0].size = 3),
        ("lies outside memory", |state| state.queues[0].used_ring = 1 << 40),
        ("first byte", |state| state.device[0] = 1),
    ];
    for (words, change) in changes {
        let mut state = saved();
        change(&mut state);
        let refused = crate::chain(&transport().restore(&state).unwrap_err());
        assert!(refused.contains(words), "{words}: {refused}");
    }
}
