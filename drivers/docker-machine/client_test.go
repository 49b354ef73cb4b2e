package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// daemon answers as no real one would do when asked to. What a real one does is shown by tests/e2e/machine.rs.
func daemon(t *testing.T, answers http.HandlerFunc) client {
	server := httptest.NewServer(answers)
	t.Cleanup(server.Close)
	return client{base: server.URL}
}

func TestWhatIsNotCatalystIsNamedSo(t *testing.T) {
	for name, answers := range map[string]http.HandlerFunc{
		"another product": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"product":"other"}`) },
		"no JSON":         func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"an error page":   func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", http.StatusBadGateway) },
		"a bare JSON":     func(w http.ResponseWriter, _ *http.Request) { http.Error(w, `{}`, http.StatusNotFound) },
	} {
		err := daemon(t, answers).check()
		if err == nil || !strings.Contains(err.Error(), "is not a Catalyst daemon") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAnAnswerWithoutEndIsNotReadToItsEnd(t *testing.T) {
	err := daemon(t, func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}).check()
	if err == nil || !strings.Contains(err.Error(), "is not a Catalyst daemon") {
		t.Error(err)
	}
}

// told is a daemon with one VM, which tells an event when it is told to.
func told(t *testing.T, state func() string, events func(http.ResponseWriter, *http.Request)) client {
	return daemon(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/events" {
			fmt.Fprint(w, ": listening\n\n")
			w.(http.Flusher).Flush()
			events(w, r)
			return
		}
		fmt.Fprint(w, state())
	})
}

func TestWaitingAsksAgainAfterEachEvent(t *testing.T) {
	asked := make(chan bool, 2)
	state := func() string {
		asked <- true
		return fmt.Sprintf(`{"state":"powered on","guest":{"ssh":%t}}`, len(asked) == 2)
	}
	events := func(w http.ResponseWriter, r *http.Request) {
		for len(asked) < 1 && r.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		fmt.Fprint(w, "data: {}\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	if err := told(t, state, events).wait("m1", time.Minute, "SSH", func(now guest) bool { return now.SSH }); err != nil {
		t.Error(err)
	}
	if len(asked) != 2 {
		t.Errorf("asked %d times", len(asked))
	}
}

func TestWaitingEndsWithTheVMTheDaemonAndTheTime(t *testing.T) {
	never := func(guest) bool { return false }
	on := func() string { return `{"state":"powered on"}` }
	off := func() string { return `{"state":"powered off","reason":"the VM process was killed"}` }
	ends := func(http.ResponseWriter, *http.Request) {}
	stays := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for wanted, err := range map[string]error{
		"became powered off while it was waited for: the VM process was killed": told(t, off, stays).wait("m1", time.Minute, "SSH", never),
		"ended while 'm1' was waited for":                                       told(t, on, ends).wait("m1", time.Minute, "SSH", never),
		"SSH in 'm1' did not answer within 50ms":                                told(t, on, stays).wait("m1", 50*time.Millisecond, "SSH", never),
	} {
		if err == nil || !strings.Contains(err.Error(), wanted) {
			t.Errorf("%v, and not: %s", err, wanted)
		}
	}
}
