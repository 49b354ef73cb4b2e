package main

import (
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/rancher/machine/libmachine/drivers"
	rpcdriver "github.com/rancher/machine/libmachine/drivers/rpc"
	"github.com/rancher/machine/libmachine/state"
)

// given are the flags as rancher-machine hands them over, with some changed.
func given(changed map[string]any) drivers.DriverOptions {
	values := map[string]any{"swarm-master": false, "swarm-host": "", "swarm-discovery": ""}
	for _, flag := range newDriver().GetCreateFlags() {
		values[flag.String()] = flag.Default()
	}
	for name, value := range changed {
		values[name] = value
	}
	return &rpcdriver.RPCFlags{Values: values}
}

func TestFlagsOfWhichNothingCanComeAreRefusedInOneSentence(t *testing.T) {
	for _, bad := range []struct {
		flag  string
		value any
	}{
		{"catalyst-url", "localhost:8080"},
		{"catalyst-url", "http://"},
		{"catalyst-url", "ftp://localhost"},
		{"catalyst-url", "::"},
		{"catalyst-ssh-user", ""},
		{"catalyst-cpu-count", 0},
		{"catalyst-memory-size", -1},
		{"catalyst-disk-size", 0},
	} {
		err := newDriver().SetConfigFromFlags(given(map[string]any{bad.flag: bad.value}))
		if err == nil || !strings.HasPrefix(err.Error(), "--"+bad.flag) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s %v: %v", bad.flag, bad.value, err)
		}
	}
	d := newDriver()
	if err := d.SetConfigFromFlags(given(map[string]any{"catalyst-url": "http://[::1]:9090/"})); err != nil {
		t.Fatal(err)
	}
	if d.URL != "http://[::1]:9090" {
		t.Error(d.URL)
	}
}

func TestEveryFlagHasAVariable(t *testing.T) {
	flags, _ := json.Marshal(newDriver().GetCreateFlags())
	var all []struct{ Name, EnvVar string }
	if err := json.Unmarshal(flags, &all); err != nil {
		t.Fatal(err)
	}
	for _, flag := range all {
		if flag.EnvVar != strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_")) {
			t.Errorf("%s has %q", flag.Name, flag.EnvVar)
		}
	}
}

func TestAllThatIsNeededLaterIsSaved(t *testing.T) {
	before := newDriver()
	changed := map[string]any{
		"catalyst-url": "http://localhost:9090", "catalyst-cpu-count": 2, "catalyst-memory-size": 512,
		"catalyst-disk-size": 100, "catalyst-template": "other", "catalyst-ssh-user": "me",
		"catalyst-tag": []string{"a"},
	}
	if err := before.SetConfigFromFlags(given(changed)); err != nil {
		t.Fatal(err)
	}
	before.MachineName, before.StorePath, before.MAC = "m1", "/store", "02:ca:00:00:00:01"
	saved, err := json.Marshal(before)
	if err != nil {
		t.Fatal(err)
	}
	after := newDriver()
	if err := json.Unmarshal(saved, after); err != nil {
		t.Fatal(err)
	}
	again, _ := json.Marshal(after)
	if string(again) != string(saved) || after.Tags[0] != "a" || after.MAC != before.MAC {
		t.Errorf("%s\n%s", saved, again)
	}
	if after.GetSSHKeyPath() != "/store/machines/m1/id_rsa" {
		t.Error(after.GetSSHKeyPath())
	}
}

func TestEachStateOfTheDaemonIsOneOfLibmachines(t *testing.T) {
	for word, wanted := range map[string]state.State{
		"powered off": state.Stopped, "powering on": state.Starting, "powered on": state.Running,
		"powering off": state.Stopping, "suspending": state.Stopping, "suspended": state.Saved,
		"paused": state.Paused, "blocked": state.Error,
	} {
		if got, err := stateOf(word); err != nil || got != wanted {
			t.Errorf("%s: %s, %v", word, got, err)
		}
	}
	if got, err := stateOf("melting"); got != state.Error || err == nil {
		t.Errorf("a word that is not known: %s, %v", got, err)
	}
}

func TestWithoutADaemonEachCallSaysSo(t *testing.T) {
	// A port that was free just now, where nobody listens.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver()
	d.MachineName, d.URL = "m1", "http://"+listener.Addr().String()
	listener.Close()
	_, stateErr := d.GetState()
	for name, err := range map[string]error{
		"check": d.PreCreateCheck(), "state": stateErr, "start": d.Start(), "stop": d.Stop(), "kill": d.Kill(),
		"restart": d.Restart(), "remove": d.Remove(),
	} {
		if err == nil || !strings.Contains(err.Error(), "no Catalyst daemon answers at "+d.URL) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSettingsThatTheProvisionerSaysAreTakenOutAndOthersStay(t *testing.T) {
	settings := `{"storage-driver": "overlay2", "debug": true, "hosts": ["fd://"]}`
	after, changed := withoutProvisioned([]byte(settings))
	if !changed || string(after) != "{\n  \"debug\": true\n}\n" {
		t.Errorf("%t: %s", changed, after)
	}
	for _, untouched := range []string{`{}`, `{"debug": true}`, `[]`, `nonsense`, ``} {
		if after, changed := withoutProvisioned([]byte(untouched)); changed || string(after) != untouched {
			t.Errorf("%s became %s", untouched, after)
		}
	}
}

func TestErrorsHaveTheirCausesAndWords(t *testing.T) {
	var refused refusal
	said := `{"code":"disk_full","message":"Cannot write","causes":["no space"]}`
	if err := json.Unmarshal([]byte(said), &refused); err != nil {
		t.Fatal(err)
	}
	if refused.Error() != "Cannot write: no space" || !isRefusal(&refused, "disk_full") {
		t.Error(refused)
	}
	if err := json.Unmarshal([]byte(`{"code":403,"message":"Only its owner"}`), &refused); err != nil {
		t.Fatal(err)
	}
	if isRefusal(&refused, "disk_full") || isRefusal(errors.New("disk_full"), "disk_full") {
		t.Error("a word that was not said")
	}
}
