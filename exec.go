// This file runs one approved argv to its end, and keeps the slots.
// It may start and signal commands, and it alone.
// It must not decide: what it runs was approved in acl.go, and it runs exactly that.
package main

import (
	"context"
	"time"
)

// command is everything one run needs, taken from one snapshot.
type command struct {
	what       approved
	env        []string
	cwd        string
	cred       *credential // nil: the server's own user
	limits     rlimits
	noNewPrivs bool
	timeout    time.Duration
	killGrace  time.Duration
	maxBytes   int64  // of standard output and error together
	stdin      []byte // nil: empty
	sink       sink   // nil: captured in the outcome
}

// sink takes output as it comes, one call at a time. stream is 1 or 2; idle says that nothing more is waiting in the pipe,
// so that this is the moment to flush. An error (client gone, stalled) ends the command.
type sink interface {
	output(stream int, p []byte, idle bool) error
}

// end is why a run ended.
type end string

const (
	endExit     end = "exit"          // by itself: exit code or signal
	endTimeout  end = "timeout"       // command.timeout
	endOutput   end = "output_limit"  // command.maxBytes
	endClient   end = "client_gone"   // the context was cancelled, or the sink failed
	endShutdown end = "shutting_down" // runner.shutdown
	endStart    end = "start_failed"  // never ran: outcome.err, exit code 126 or 127 as a shell reports it
	endInternal end = "internal"      // aexec's own failure: outcome.err
)

// outcome is what came of one run. When run returns, nothing that the command started is alive.
type outcome struct {
	end                      end
	exitCode                 int    // valid if exited
	exited                   bool   // false: killed by a signal, or never ran
	signal                   string // "SIGSEGV"; "" if exited
	err                      error  // endStart: a sentence for the agent
	stdout, stderr           chunks // captured output, in pieces; empty with a sink
	stdoutBytes, stderrBytes int64  // raw bytes that were read
	duration                 time.Duration
}

// chunks is captured output as a list of pieces, so that it is never copied to grow.
type chunks [][]byte

// runner starts and ends commands; one for the whole server.
type runner struct{}

// newRunner prepares the server for running commands: spawner threads, subreaper, core limit; then ends what a crashed server
// of the same configuration directory left (returning how many processes that were).
func newRunner(configDir string) (*runner, int, error) { panic("exec") }

// acquire takes one of max slots; false if all are taken or the runner shuts down. release is called when run has returned and exec_end is written.
func (r *runner) acquire(max int) (release func(), ok bool) { panic("exec") }

// run runs the command to its end. ctx is the request's: its cancellation means that the client is gone.
func (r *runner) run(ctx context.Context, c command) outcome { panic("exec") }

// shutdown ends every running command with endShutdown and lets no further one start. It does not wait.
func (r *runner) shutdown() { panic("exec") }

// shuttingDown says whether shutdown was called.
func (r *runner) shuttingDown() bool { panic("exec") }
