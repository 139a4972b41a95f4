// This file is the pipes of one run: input in, output captured or handed on, within the limit, to the end.
// It may read what a command wrote and write what it is to read; it is apart from exec.go, as that ends processes and this moves bytes.
// It must not start, signal or wait for a process.
package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	firstChunkBytes = 1 << 10   // most commands say little: do not allocate for those that say much
	chunkBytes      = 32 << 10  // of captured output
	streamBytes     = 256 << 10 // buffer and pipe of a streamed command

	drainPatience = time.Second // how long a pipe may stay open and silent when nothing of the command is left
)

// sink takes output as it comes, one call at a time. stream is 1 or 2; idle says that nothing more is waiting in the pipe,
// so that this is the moment to flush. An error (client gone, stalled) ends the command.
type sink interface {
	output(stream int, p []byte, idle bool) error
}

// chunks is captured output as a list of pieces, so that it is never copied to grow.
type chunks [][]byte

// plumbing is the pipes of one run, and what comes out of them.
type plumbing struct {
	c         command
	total     atomic.Int64
	stop      func(error) // ends the run; the error is an end
	sinking   sync.Mutex  // one call of the sink at a time
	failure   error       // of the sink, which gets nothing more
	streams   [2]stream   // standard output, standard error
	stdin     *os.File    // our end, nil for /dev/null
	childSide [3]*os.File // what the child gets as 0 (nil: /dev/null), 1, 2
	pumps     sync.WaitGroup
}

type stream struct {
	number   int
	file     *os.File
	source   io.Reader // the file, or what was left in it at the deadline of drain
	captured chunks
	bytes    int64
}

// openPlumbing leaves it to the caller to close both sides, with an error too.
func openPlumbing(c command, stop func(error)) (*plumbing, error) {
	p := &plumbing{c: c, stop: stop}
	var errs [3]error
	for i := range p.streams {
		s := &p.streams[i]
		s.number = i + 1
		s.file, p.childSide[s.number], errs[i] = outputPipe(c.sink != nil)
		s.source = s.file
	}
	if c.stdin != nil {
		p.childSide[0], p.stdin, errs[2] = os.Pipe()
	}
	return p, errors.Join(errs[:]...)
}

func (p *plumbing) closeChildSide() {
	for _, f := range p.childSide {
		f.Close() // nil too: an error that nobody needs
	}
}

func (p *plumbing) close() {
	p.streams[0].file.Close()
	p.streams[1].file.Close()
	p.stdin.Close()
}

// pump starts to move input and output, once the command has started.
func (p *plumbing) pump() {
	if p.stdin != nil {
		go func() {
			p.stdin.Write(p.c.stdin) // what is not read is not missed
			p.stdin.Close()
		}()
	}
	for i := range p.streams {
		p.pumps.Go(func() { p.move(&p.streams[i]) })
	}
}

// drain waits for the end of the output, when nothing that the command started is alive. The deadline is for a pipe that
// something beyond our reach holds open (a process that changed its user, or hangs in the kernel).
func (p *plumbing) drain() {
	for i := range p.streams {
		p.streams[i].file.SetReadDeadline(time.Now().Add(drainPatience))
	}
	p.pumps.Wait()
}

// move keeps what fits the limit, in pieces, or hands it to the sink, and reads on to the end.
func (p *plumbing) move(s *stream) {
	size := chunkBytes
	if p.c.sink != nil {
		size = streamBytes
	}
	for piece := make([]byte, 0, firstChunkBytes); ; {
		n, err := s.read(piece[len(piece):cap(piece)])
		fits := p.admit(n)
		s.bytes += int64(fits)
		piece = piece[:len(piece)+fits]
		full := len(piece) == cap(piece)
		if p.c.sink != nil {
			p.hand(s, piece)
			piece = piece[:0]
		} else if (full || err != nil) && len(piece) > 0 {
			s.captured = append(s.captured, piece)
		}
		if err != nil {
			return
		}
		if full && (p.c.sink == nil || cap(piece) < size) {
			piece = make([]byte, 0, size)
		}
	}
}

// hand gives a piece to the sink, unless that has failed.
func (p *plumbing) hand(s *stream, piece []byte) {
	p.sinking.Lock()
	defer p.sinking.Unlock()
	if len(piece) == 0 || p.failure != nil {
		return
	}
	if p.failure = p.c.sink.output(s.number, piece, pendingBytes(s.file) == 0); p.failure != nil {
		p.stop(endClient)
	}
}

// read is Read, but that what waits in the pipe when the deadline passes is read all the same, and not more: a slow sink
// loses nothing, and a stranger that opened the pipe through /proc and goes on writing, or reads, too, gains nothing.
func (s *stream) read(b []byte) (n int, err error) {
	if n, err = s.source.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	rest := make([]byte, pendingBytes(s.file))
	s.file.SetReadDeadline(time.Now().Add(drainPatience))
	n, _ = s.file.Read(rest)
	s.source = bytes.NewReader(rest[:n])
	return s.source.Read(b)
}

// admit says how many of n more bytes are within the limit.
func (p *plumbing) admit(n int) int {
	over := p.total.Add(int64(n)) - p.c.maxBytes
	if over <= 0 {
		return n
	}
	p.stop(endOutput)
	return max(0, n-int(over))
}

// outcome sums up a run that started.
func (p *plumbing) outcome(why end, status syscall.WaitStatus) outcome {
	switch { // what was still in the pipe after an exit counts too
	case why != endExit:
	case p.failure != nil:
		why = endClient
	case p.total.Load() > p.c.maxBytes:
		why = endOutput
	}
	out, errs := &p.streams[0], &p.streams[1]
	o := outcome{end: why, stdout: out.captured, stderr: errs.captured, stdoutBytes: out.bytes, stderrBytes: errs.bytes}
	if status.Exited() {
		o.exited, o.exitCode = true, status.ExitStatus()
	} else {
		o.signalNumber, o.signal = int(status.Signal()), signalName(status.Signal())
	}
	return o
}
