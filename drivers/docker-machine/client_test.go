package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// daemon answers as no real one does when it is asked to. What a real one does tests/e2e/machine.rs shows.
func daemon(t *testing.T, answers http.HandlerFunc) client {
	server := httptest.NewServer(answers)
	t.Cleanup(server.Close)
	return client{base: server.URL}
}

func TestWhatIsNotCatalystIsNamedSo(t *testing.T) {
	for _, answer := range []struct {
		status int
		body   string
	}{
		{http.StatusOK, `{"product":"other"}`},
		{http.StatusOK, "<html>"},
		{http.StatusBadGateway, "<html>"},
		{http.StatusNotFound, `{}`},
	} {
		err := daemon(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(answer.status)
			fmt.Fprint(w, answer.body)
		}).check()
		text := fmt.Sprint(err)
		if !strings.Contains(text, "is not a Catalyst daemon") || strings.Contains(text, "\n") {
			t.Errorf("%d %s: %v", answer.status, answer.body, err)
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
	answers := func(now guest) bool { return now.SSH }
	if err := told(t, state, events).wait("m1", time.Minute, "SSH", answers); err != nil {
		t.Error(err)
	}
	if len(asked) != 2 {
		t.Errorf("asked %d times", len(asked))
	}
}

func TestWaitingEndsWithTheVMTheDaemonAndTheTime(t *testing.T) {
	const on, off = `{"state":"powered on"}`, `{"state":"powered off","reason":"the VM process was killed"}`
	ends := func(http.ResponseWriter, *http.Request) {}
	stays := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	wait := func(state string, events http.HandlerFunc, limit time.Duration) error {
		never := func(guest) bool { return false }
		return told(t, func() string { return state }, events).wait("m1", limit, "SSH", never)
	}
	for wanted, err := range map[string]error{
		"became powered off while it was waited for: the VM process was killed": wait(off, stays, time.Minute),
		"ended while 'm1' was waited for":                                       wait(on, ends, time.Minute),
		"SSH in 'm1' did not answer within 50ms":                                wait(on, stays, 50*time.Millisecond),
	} {
		if err == nil || !strings.Contains(err.Error(), wanted) {
			t.Errorf("%v, and not: %s", err, wanted)
		}
	}
}
