"""How good a policy is: whole episodes, honest intervals, films and figures."""
