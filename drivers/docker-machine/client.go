package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// How long an answer may take. The longest are a shutdown (50 s) and a command in the guest (60 s).
	answerLimit = 2 * time.Minute
	// The most that is read of an answer, in bytes. A command's output is at most 2 MiB before JSON escapes it.
	answerSize = 16 << 20
)

// client speaks /v1 of one daemon; api/src has the types, and /v1/openapi.json describes it.
type client struct {
	// Where the daemon is, such as http://localhost:8080.
	base string
}

// vm is what the driver needs to know of a VM.
type vm struct {
	ID      string   `json:"id"`
	State   string   `json:"state"`
	Reason  string   `json:"reason"`
	Tags    []string `json:"tags"`
	MAC     string   `json:"mac"`
	Address string   `json:"address"`
	Guest   guest    `json:"guest"`
}

// guest is what the agent says of its guest.
type guest struct {
	SSH    bool `json:"ssh"`
	Docker bool `json:"docker"`
}

// createVM is the body of POST /v1/vms.
type createVM struct {
	ID       string   `json:"id"`
	Template string   `json:"template,omitempty"`
	CPUs     int      `json:"cpus"`
	Memory   int      `json:"memory_mib"`
	Disk     int      `json:"disk_gib"`
	Tags     []string `json:"tags"`
}

// command is the body of POST /v1/vms/{id}/exec.
type command struct {
	Argv  []string `json:"argv"`
	User  string   `json:"user,omitempty"`
	Stdin string   `json:"stdin"`
}

// refusal is the daemon's error. Its code is a word, or a number where the sender may not use the daemon
// at all.
type refusal struct {
	Code    any      `json:"code"`
	Message string   `json:"message"`
	Causes  []string `json:"causes"`
}

func (r *refusal) Error() string {
	return strings.Join(append([]string{r.Message}, r.Causes...), ": ")
}

// isRefusal tells whether the daemon refused with this word.
func isRefusal(err error, code string) bool {
	var refused *refusal
	return errors.As(err, &refused) && refused.Code == code
}

// check fails, in one sentence, where no Catalyst daemon answers.
func (c client) check() error {
	var version struct {
		Product string `json:"product"`
	}
	if err := c.call(http.MethodGet, "/v1/version", nil, &version); err != nil {
		return err
	}
	if version.Product != "catalyst" {
		return c.foreign("it names its product " + fmt.Sprintf("%q", version.Product))
	}
	return nil
}

func (c client) vm(id string) (*vm, error) {
	found := new(vm)
	return found, c.call(http.MethodGet, vmPath(id), nil, found)
}

func (c client) create(request createVM) (*vm, error) {
	made := new(vm)
	return made, c.call(http.MethodPost, "/v1/vms", request, made)
}

func (c client) power(id, op string) error {
	return c.call(http.MethodPost, vmPath(id)+"/power", map[string]string{"op": op}, nil)
}

// remove deletes a VM, one that runs too.
func (c client) remove(id string) error {
	return c.call(http.MethodDelete, vmPath(id)+"?force=true", nil, nil)
}

// run runs a command in the guest, which must succeed.
func (c client) run(id string, what command) error {
	var output struct {
		ExitCode int    `json:"exit_code"`
		Stderr   string `json:"stderr"`
	}
	if err := c.call(http.MethodPost, vmPath(id)+"/exec", what, &output); err != nil {
		return err
	}
	if output.ExitCode != 0 {
		said := strings.TrimSpace(output.Stderr)
		return fmt.Errorf("the command %q in '%s' ended with %d: %s", what.Argv, id, output.ExitCode, said)
	}
	return nil
}

// readFile reads a small file of the guest.
func (c client) readFile(id, path string) ([]byte, error) {
	return c.exchange(http.MethodGet, filePath(id, path), nil)
}

// writeFile writes a file of the guest, which takes its place when it is whole.
func (c client) writeFile(id, path string, content []byte) error {
	_, err := c.exchange(http.MethodPut, filePath(id, path), content)
	return err
}

// wait waits until a VM's guest is so far: it asks when the daemon begins to tell events of the VM, and
// after each.
func (c client) wait(id string, limit time.Duration, what string, reached func(guest) bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	address := c.base + "/v1/events?vm=" + url.QueryEscape(id)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	events, err := http.DefaultClient.Do(request)
	if err != nil {
		return c.silent(err)
	}
	defer events.Body.Close()
	// The first line comes at once, and says that events are told from now on.
	for lines := bufio.NewScanner(events.Body); lines.Scan(); {
		if lines.Text() == "" {
			continue
		}
		now, err := c.vm(id)
		if err != nil {
			return err
		}
		if now.State != "powering on" && now.State != "powered on" {
			return fmt.Errorf("the VM '%s' became %s while it was waited for: %s", id, now.State, now.Reason)
		}
		if reached(now.Guest) {
			return nil
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s in '%s' did not answer within %s; see: catalyst logs %s", what, id, limit, id)
	}
	return fmt.Errorf("the daemon at %s ended while '%s' was waited for", c.base, id)
}

// call sends body as JSON, and takes JSON into reply, where they are not nil.
func (c client) call(method, path string, body, reply any) error {
	var content []byte
	if body != nil {
		var err error
		if content, err = json.Marshal(body); err != nil {
			return err
		}
	}
	answer, err := c.exchange(method, path, content)
	if err != nil || reply == nil {
		return err
	}
	if err := json.Unmarshal(answer, reply); err != nil {
		return c.foreign("its answer is no JSON of ours")
	}
	return nil
}

// exchange sends one request and gives the body of the answer, which must be a success.
func (c client) exchange(method, path string, content []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerLimit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, c.silent(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, answerSize))
	if err != nil {
		return nil, c.silent(err)
	}
	if answer.StatusCode < 300 {
		return body, nil
	}
	refused := new(refusal)
	if json.Unmarshal(body, refused) != nil || refused.Message == "" {
		return nil, c.foreign("it answered " + answer.Status)
	}
	return nil, refused
}

func (c client) silent(err error) error {
	var where *url.Error
	if errors.As(err, &where) {
		err = where.Err
	}
	const message = "no Catalyst daemon answers at %s (%w); start one with: catalyst daemon start"
	return fmt.Errorf(message, c.base, err)
}

func (c client) foreign(why string) error {
	return fmt.Errorf("what answers at %s is not a Catalyst daemon: %s", c.base, why)
}

func vmPath(id string) string {
	return "/v1/vms/" + url.PathEscape(id)
}

func filePath(id, path string) string {
	return vmPath(id) + "/files?path=" + url.QueryEscape(path)
}
