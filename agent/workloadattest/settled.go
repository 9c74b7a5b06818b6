package workloadattest

import "errors"

// Settled is what an error of Method.Selectors is that says why a process does not have a selector, and not that finding out failed:
// asking again while the process stays as it is would find the same, such as that a program in a container is at no path of the
// agent's. What else was found out is kept as a whole result is, and nobody is warned.
type Settled interface {
	error
	Settled()
}

// unsettled parts what a method could not find out from what it found that there is not. It looks into errors.Join.
func unsettled(err error) (failure, settled error) {
	switch e := err.(type) {
	case Settled:
		return nil, e
	case interface{ Unwrap() []error }:
		var failures, absences []error
		for _, err := range e.Unwrap() {
			f, s := unsettled(err)
			failures, absences = append(failures, f), append(absences, s)
		}
		return errors.Join(failures...), errors.Join(absences...)
	}
	return err, nil
}
