"""What is learnt: next-token prediction, flow matching, routing; the draws behind them and the account of their
losses."""
